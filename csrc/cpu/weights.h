// The weights of a CPU executor, held in one of two ways: read from the file once, in parallel, straight into panels in
// one huge-page arena; or mapped, shared with all who use the file, and packed panel by panel just before use.
#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "gguf.h"
#include "loading.h"

namespace gemmart::cpu {

// Anonymous memory on huge pages where the system grants them: a guest's 4 KiB pages read at half the speed.
class Arena {
  public:
    explicit Arena(size_t n_bytes);  // throws OutOfMemory
    ~Arena();
    Arena(const Arena&) = delete;
    void lock(const Loading& loading);  // lock_memory(); throws Cancelled too
    std::byte* take(size_t n_bytes);    // 64-byte aligned; all takes together at most n_bytes, each rounded up to 64

  private:
    std::byte* base_;
    size_t size_, used_ = 0;
};

// How weights are held.
struct WeightOptions {
    bool mapped = false;  // as rows in the file, packed again for each product; otherwise packed once, in memory
    // Bytes of the file that may stay in the system's cache. If that is less than all of it, packed weights leave the
    // cache when they have been read. Of mapped ones, so many matrices as are too much leave it after each product:
    // else each token would push out of the cache what the next one begins with, and all would be read again.
    size_t cache_bytes = std::numeric_limits<size_t>::max();
    bool locked = false;  // they stay in memory; then mapped ones stay in the cache, whatever cache_bytes says
};

// Bytes of memory that matrices take where they are packed; where they are mapped, those of a thread's room, and of the
// matrices that must be copied since no single range of the source holds them.
size_t packed_bytes(const std::vector<const Tensor*>& tensors);
size_t room_bytes(const std::vector<const Tensor*>& tensors);
size_t copied_bytes(const ByteSource& source, const std::vector<const Tensor*>& tensors);

struct LoadItem {
    const Tensor* tensor;  // two dimensions
    Matrix* to;
};

// The matrices of a model, and what holds them.
class Weights {
  public:
    // Fills `items`. Throws OutOfMemory, FileChanged, Cancelled.
    Weights(const GgufFile& file, const std::vector<LoadItem>& items, const WeightOptions& options, Loading& loading,
            ThreadPool& pool);

    // product(panels, begin, end, first_row) until panels [begin, end) of w are done: `panels` is w itself, or the rows
    // of w from first_row on, packed in this thread's room, as many as fit.
    template <typename F>
    void each_panels(int thread, const Matrix& w, int begin, int end, F product) const {
        const size_t stride = panel_bytes(w.dtype, w.n_cols);
        if (w.packed || !stride) {
            product(w, begin, end, 0);
        } else {
            const int n_fit = static_cast<int>(room_bytes_ / stride);
            for (int panel = begin; panel < end; panel += n_fit) {
                const int n = std::min(n_fit, end - panel), row = panel * kPanel;
                pack(w, panel, n, rooms_[thread]);
                product({w.dtype, true, w.n_rows - row, w.n_cols, rooms_[thread], stride}, 0, n, row);
            }
        }
        if (!streams_.empty()) note_use(w, end - begin);
    }

    // Throws FileChanged if mapped weights are no longer those that were loaded. After a pass, this finds all that was
    // written to the file meanwhile; what another program writes through a mapping of its own, when the system tells.
    void check_unchanged() const;

  private:
    // A mapped matrix that does not stay in the cache.
    struct Stream {
        Stream(const Tensor* tensor, const std::byte* data) : tensor(tensor), data(data) {}
        const Tensor* tensor;
        const std::byte* data;
        std::atomic<int> n_used{0};  // panels, of those of one product
    };

    void load(const std::vector<LoadItem>& items, bool drop_cached, Loading& loading, ThreadPool& pool);
    void map(const std::vector<LoadItem>& items, const WeightOptions& options, Loading& loading);
    void note_use(const Matrix& w, int n_panels) const;
    static void pack(const Matrix& w, int panel, int n_panels, std::byte* to);

    const GgufFile& file_;
    const size_t room_bytes_;
    Arena arena_;
    std::unique_ptr<MappedSource> mapped_;
    mutable std::deque<Stream> streams_;  // in order of use
    std::vector<std::byte*> rooms_;       // a thread, where mapped
};

}  // namespace gemmart::cpu
