// Keys and values of past tokens, in pages.
//
// A page holds kPageTokens consecutive positions of one sequence for all layers of one group: the layers that see
// everything (Global) or the sliding-window layers (Windowed). A sequence is a list of pages a group. Sharing a prefix
// is sharing pages: a page that two sequences hold is copied before one of them writes it; a page that one sequence and
// the cache hold leaves the cache. A windowed group gives back the pages that no position from (length - slack) on can
// see. Full pages stay, when their sequence ends, as a cached prefix until their space is wanted. One thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kv_layout.h"

namespace gemmart {

// Where the pages of some layers are kept, if not in the cache's own memory: on a device.
class PageStore {
  public:
    virtual ~PageStore() = default;
    // The parts that all its layers of a group have in a page.
    virtual void copy(Group group, int32_t from, int32_t to) = 0;
    // A layer's part of a page. layer: of the model.
    virtual void read(int layer, int32_t page, std::byte* to) = 0;
    virtual void write(int layer, int32_t page, const std::byte* from) = 0;
};

struct KvLayer {
    int n_kv_heads;
    int head_dim;
    int window;                  // tokens, 0 = unlimited
    PageStore* store = nullptr;  // null: the cache's own memory
};

class KvCache {
  public:
    static constexpr int kGivenBack = -1;
    static constexpr int kChunk = 2048;  // tokens; the windowed group has room for reserve() of so many a sequence

    // Room for n_tokens positions in the global group, and as much as `n_sequences` sequences of up to n_tokens in all
    // can need in the windowed one. The memory is reserved, not touched. Throws OutOfMemory. slack: how far a sequence
    // can be trimmed back and still find all that its windowed layers see.
    KvCache(std::vector<KvLayer> layers, KvType type, int64_t n_tokens, int n_sequences, int slack);
    ~KvCache();
    KvCache(const KvCache&) = delete;

    int new_sequence();
    // A new sequence that shares the first `upto` positions (0 <= upto <= length). Where the windowed pages of that
    // position are gone, throws std::invalid_argument.
    int fork(int seq, int upto);
    // Shortens to the longest usable length <= upto and returns it: `upto` itself where its windowed pages are still
    // held, else 0.
    int trim(int seq, int upto);
    // A new sequence that shares the longest cached prefix of `ids`, whole pages, usable in both groups, at most n_ids
    // - 1 long (so that there is always a token left to compute); sequences see only prefixes stored under their own
    // salt.
    struct Match {
        int seq;
        int length;
    };
    Match match_prefix(std::span<const int32_t> ids, uint64_t salt);
    // A new sequence whose positions [0, n) are writable until commit(), n whole pages, of whose windowed pages the
    // first `held_from` are given back: for keys and values that were computed before and are to be copied in. Throws
    // OutOfMemory as reserve() does.
    int restore(int n, int held_from, uint64_t salt);
    void free(int seq);  // its full pages stay cached until their space is wanted

    // Makes positions [length, length + n) writable until commit() or trim(); throws OutOfMemory (and changes nothing)
    // where pages are missing even after dropping all cached prefixes.
    void reserve(int seq, int n);
    // After the tokens `ids` were computed at [length, length + n): moves length, remembers the ids, registers pages
    // that became full as cached prefix under the sequence's salt (given to match_prefix; 0 for new_sequence; a fork
    // has that of its origin), gives back what fell out of the window and what was reserved beyond. Where that prefix
    // is stored already, the sequence takes the stored page for its own.
    void commit(int seq, std::span<const int32_t> ids);
    // Whether reserve() of these counts, all together, would succeed; each sequence once.
    bool can_hold(std::span<const int> seqs, std::span<const int> counts) const;

    void drop_cached();  // all cached prefixes

    int length(int seq) const;
    bool is_open(int seq) const;
    // Page ids of a sequence in order of position, until it next changes; kGivenBack where the windowed group has let
    // go.
    std::span<const int32_t> pages(int seq, Group group) const;
    Group group(int layer) const;
    const std::vector<KvLayer>& layers() const;
    KvType type() const;
    // Start of a layer's part in a page (kv head 0; the next head follows after KvHeadLayout::n_bytes), if it lies in
    // the cache's own memory.
    std::byte* at(int layer, int32_t page) const;
    // A layer's part of a page, wherever it is kept: part_bytes(layer) of them. For pages of sequences that nobody
    // computes; then it may run beside other threads.
    size_t part_bytes(int layer) const;
    void read(int layer, int32_t page, std::byte* to) const;
    void write(int layer, int32_t page, const std::byte* from);

    struct Stats {
        int64_t n_pages[2], n_free[2], n_cached[2];  // a group; cached: held only as prefix, can be dropped
        int64_t page_bytes[2];                       // in the cache's own memory
        int n_sequences;
    };
    Stats stats() const;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace gemmart
