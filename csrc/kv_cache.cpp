// A page counts the sequences that hold it and knows the node of the prefix tree, if any, that does. A node stands for
// one full page of tokens after its parent's; it can let go of either page, and stays while something below it is left.
#include "kv_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cstring>
#include <map>
#include <numeric>
#include <unordered_map>
#include <utility>

#include "error.h"

namespace gemmart {
namespace {

constexpr int kNone = -1;
constexpr size_t kHugePageFrom = size_t{1} << 20;  // bytes a page; below, huge pages would touch much more than is used

int64_t n_pages_for(int64_t n_tokens) { return (n_tokens + kPageTokens - 1) / kPageTokens; }

struct Node;

struct NodeKey {
    Node* parent;  // nullptr: the page starts at position 0
    uint64_t salt;
    std::array<int32_t, kPageTokens> ids;

    // The i-th page of `tokens`.
    NodeKey(Node* parent, uint64_t salt, std::span<const int32_t> tokens, size_t i) : parent(parent), salt(salt) {
        std::ranges::copy(tokens.subspan(i * kPageTokens, kPageTokens), ids.begin());
    }
    bool operator==(const NodeKey&) const = default;
};

struct NodeHash {
    size_t operator()(const NodeKey& key) const {
        uint64_t h = reinterpret_cast<uintptr_t>(key.parent) ^ key.salt;
        for (int32_t id : key.ids) {
            h = (h ^ static_cast<uint32_t>(id)) * 0x9e3779b97f4a7c15;
            h ^= h >> 29;
        }
        return h;
    }
};

struct Node {
    const NodeKey* key;                // in the map of nodes
    int32_t page[2] = {kNone, kNone};  // a group
    int users = 0;                     // children, and sequences whose last full page this is
    uint64_t idle_since[2] = {0, 0};   // its key in Pool::idle
};

struct Page {
    int n_holders = 0;     // sequences
    Node* node = nullptr;  // what is stored in the prefix tree; a page is free without a holder and a node
};

// The pages of one group.
struct Pool {
    std::byte* base = nullptr;
    size_t n_bytes = 0;
    size_t page_bytes = 0;
    std::vector<PageStore*> stores;  // of the layers whose pages lie elsewhere
    int window = 0;                  // tokens; 0 = unlimited
    std::vector<Page> pages;
    std::vector<int32_t> free;
    int64_t n_cached = 0;  // pages without a holder, with a node
    // By age, oldest first. Global: the nodes without users. Windowed: the nodes whose windowed page has no holder.
    std::map<uint64_t, Node*> idle;

    int64_t n_available() const { return static_cast<int64_t>(free.size()) + n_cached; }

    void allocate(int64_t n_pages) {
        bool overflow = __builtin_mul_overflow(static_cast<size_t>(n_pages), page_bytes, &n_bytes);
        n_bytes = std::max<size_t>(n_bytes, 1);
        void* memory = overflow ? MAP_FAILED
                                : mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        check<OutOfMemory>(memory != MAP_FAILED, "cannot reserve the KV cache: ", n_pages, " pages of ", page_bytes,
                           " bytes; use a smaller context, fewer sequences or a smaller KV type");
        base = static_cast<std::byte*>(memory);
        pages.resize(n_pages);
        if (page_bytes >= kHugePageFrom) madvise(memory, n_bytes, MADV_HUGEPAGE);  // a hint: refusal costs only speed
        free.resize(n_pages);
        std::iota(free.rbegin(), free.rend(), 0);  // the lowest are taken first, so that used memory stays together
    }

    ~Pool() {
        if (base) munmap(base, n_bytes);
    }
};

struct Sequence {
    uint64_t salt = 0;
    int writable = 0;  // positions below are reserved; >= ids.size()
    std::vector<int32_t> ids;
    std::vector<int32_t> pages[2];
    int held_from = 0;     // index of the first windowed page still held
    Node* node = nullptr;  // of the last full page

    int length() const { return static_cast<int>(ids.size()); }
};

}  // namespace

struct KvCache::Impl {
    std::vector<KvLayer> layers;
    std::vector<size_t> layer_offset;  // bytes inside a page
    std::vector<size_t> part_bytes;    // of each layer
    KvType type;
    int slack;
    Pool pools[2];
    std::vector<int> groups;  // those that have layers
    std::unordered_map<NodeKey, Node, NodeHash> nodes;
    std::unordered_map<int, Sequence> sequences;
    int next_seq = 0;  // never given twice, so a stale one is noticed
    uint64_t clock = 0;

    Sequence& at(int seq) {
        auto it = sequences.find(seq);
        check<std::invalid_argument>(it != sequences.end(), "sequence ", seq, " is not open");
        return it->second;
    }

    int add(Sequence sequence) {
        sequences.emplace(next_seq, std::move(sequence));
        return next_seq++;
    }

    // Index of the first windowed page that position `pos` and all after it see.
    int first_seen(int64_t pos) const {
        return static_cast<int>(std::max<int64_t>(0, pos - pools[Windowed].window + 1) / kPageTokens);
    }

    bool has(Group group) const { return !pools[group].pages.empty(); }

    bool usable(const Sequence& s, int upto) const {
        return !has(Windowed) || upto == 0 || s.held_from <= first_seen(upto);
    }

    // --- pages and who has them ---

    void hold(int g, int32_t id) {
        Pool& pool = pools[g];
        Page& page = pool.pages[id];
        if (page.n_holders++ == 0 && page.node) {
            --pool.n_cached;
            if (g == Windowed) pool.idle.erase(page.node->idle_since[Windowed]);
        }
    }

    void let_go(int g, int32_t id) {
        Pool& pool = pools[g];
        Page& page = pool.pages[id];
        if (--page.n_holders > 0) return;
        if (!page.node) {
            pool.free.push_back(id);
            return;
        }
        ++pool.n_cached;
        if (g == Windowed) pool.idle.emplace(page.node->idle_since[Windowed] = ++clock, page.node);
    }

    int32_t take(int g) {
        Pool& pool = pools[g];
        int32_t id = pool.free.back();
        pool.free.pop_back();
        hold(g, id);
        return id;
    }

    // Shortens a sequence's list of pages; the last ones first, so that a cached prefix loses its end before its start.
    void shorten(Sequence& s, int g, int64_t n_pages) {
        std::vector<int32_t>& list = s.pages[g];
        for (; static_cast<int64_t>(list.size()) > n_pages; list.pop_back())
            if (list.back() != kGivenBack) let_go(g, list.back());
    }

    // --- the prefix tree ---

    void use(Node* node) {
        if (node && node->users++ == 0) pools[Global].idle.erase(node->idle_since[Global]);
    }

    void stop_using(Node* node) {
        if (!node) return;
        node->idle_since[Global] = ++clock;
        --node->users;
        settle(node);
    }

    // Queues a node that nobody uses for eviction; removes it, and then its parents, where nothing is stored in it.
    void settle(Node* node) {
        while (node && node->users == 0) {
            if (node->page[Global] != kNone || node->page[Windowed] != kNone) {
                pools[Global].idle.emplace(node->idle_since[Global], node);
                return;
            }
            pools[Global].idle.erase(node->idle_since[Global]);
            Node* parent = node->key->parent;
            if (parent) {
                --parent->users;
                parent->idle_since[Global] = std::max(parent->idle_since[Global], node->idle_since[Global]);
            }
            nodes.erase(nodes.find(*node->key));
            node = parent;
        }
    }

    void store(Node* node, int g, int32_t id) {
        node->page[g] = id;
        pools[g].pages[id].node = node;
    }

    // Takes a page out of the tree; its node is to be settled.
    void unstore(Node* node, int g) {
        int32_t id = std::exchange(node->page[g], kNone);
        if (id == kNone) return;
        Pool& pool = pools[g];
        pool.pages[id].node = nullptr;
        if (pool.pages[id].n_holders > 0) return;
        if (g == Windowed) pool.idle.erase(node->idle_since[Windowed]);
        --pool.n_cached;
        pool.free.push_back(id);
    }

    // The head of Pool::idle: for Global a node with both its pages, for Windowed only the windowed page.
    void evict_oldest(int g) {
        Node* node = pools[g].idle.begin()->second;
        if (g == Global) unstore(node, Global);
        unstore(node, Windowed);
        settle(node);
    }

    // The sequence's page `i` became full: stores it, or takes the page that is stored for the same tokens. Of a
    // restored sequence, a windowed one may be given back.
    void register_page(Sequence& s, int i) {
        auto [it, is_new] = nodes.try_emplace(NodeKey(s.node, s.salt, s.ids, i));
        Node* node = &it->second;
        if (is_new) {
            node->key = &it->first;
            use(s.node);  // as its child
        }
        for (int g : groups) {
            int32_t& id = s.pages[g][i];
            if (id == kGivenBack) continue;
            if (node->page[g] == kNone) {
                store(node, g, id);
            } else {
                hold(g, node->page[g]);
                let_go(g, std::exchange(id, node->page[g]));
            }
        }
        use(node);
        stop_using(std::exchange(s.node, node));
    }

    Node* ancestor(Node* node, int n_up) const {
        for (; n_up > 0; --n_up) node = node->key->parent;
        return node;
    }

    // --- room ---

    // The page that holds the sequence's last positions, if it is partly filled.
    int32_t partial_page(const Sequence& s, int g) const {
        return s.length() % kPageTokens ? s.pages[g][s.length() / kPageTokens] : kNone;
    }

    int64_t n_missing(const Sequence& s, int g, int n) const {
        return std::max<int64_t>(0, n_pages_for(int64_t{s.length()} + n) - static_cast<int64_t>(s.pages[g].size()));
    }

    // The last partly filled page, before it is written.
    void make_own(Sequence& s, int g) {
        int32_t old = partial_page(s, g);
        if (old == kNone) return;
        Pool& pool = pools[g];
        if (pool.pages[old].n_holders > 1) {
            int32_t copy = take(g);
            std::memcpy(pool.base + copy * pool.page_bytes, pool.base + old * pool.page_bytes, pool.page_bytes);
            for (PageStore* store : pool.stores) store->copy(static_cast<Group>(g), old, copy);
            s.pages[g][s.length() / kPageTokens] = copy;
            let_go(g, old);
        } else if (Node* node = pool.pages[old].node) {
            unstore(node, g);
            settle(node);
        }
    }
};

KvCache::KvCache(std::vector<KvLayer> layers, KvType type, int64_t n_tokens, int n_sequences, int slack)
    : impl_(std::make_unique<Impl>()) {
    check<std::invalid_argument>(!layers.empty(), "a KV cache needs at least one layer");
    check<std::invalid_argument>(n_sequences > 0, "n_sequences is ", n_sequences, ", expected at least 1");
    check<std::invalid_argument>(slack >= 0, "slack is ", slack, ", expected at least 0");
    check<std::invalid_argument>(n_tokens > 0 && n_tokens <= INT_MAX, "n_tokens is ", n_tokens, ", expected 1 to ",
                                 INT_MAX);
    Impl& m = *impl_;
    m.layers = std::move(layers);
    m.type = type;
    m.slack = slack;
    bool has_layers[2] = {false, false};
    for (const KvLayer& layer : m.layers) {
        check<std::invalid_argument>(layer.n_kv_heads > 0 && layer.window >= 0, "a layer has ", layer.n_kv_heads,
                                     " kv heads (expected at least 1) and a window of ", layer.window,
                                     " (expected at least 0)");
        Pool& pool = m.pools[layer.window ? Windowed : Global];
        m.layer_offset.push_back(pool.page_bytes);
        m.part_bytes.push_back(layer.n_kv_heads * kv_head_layout(type, layer.head_dim).n_bytes);
        has_layers[layer.window ? Windowed : Global] = true;
        if (!layer.store)
            pool.page_bytes += m.part_bytes.back();
        else if (std::ranges::find(pool.stores, layer.store) == pool.stores.end())
            pool.stores.push_back(layer.store);
        pool.window = std::max(pool.window, layer.window);
    }
    // Each sequence can leave one page partly filled.
    int64_t n_pages = n_pages_for(n_tokens) + n_sequences - 1;
    // Both ends of what a sequence holds of them can lie inside a page.
    int64_t n_in_window = n_pages_for(int64_t{m.pools[Windowed].window} + slack + kChunk) + 2;
    for (int g : {Global, Windowed}) {
        if (!has_layers[g]) continue;
        m.groups.push_back(g);
        m.pools[g].allocate(g == Global ? n_pages : std::min(n_pages, n_sequences * n_in_window));
    }
}

KvCache::~KvCache() = default;

int KvCache::new_sequence() { return impl_->add({}); }

int KvCache::fork(int seq, int upto) {
    Impl& m = *impl_;
    const Sequence& from = m.at(seq);
    check<std::invalid_argument>(upto >= 0 && upto <= from.length(), "sequence ", seq, " has ", from.length(),
                                 " tokens, it cannot be forked at ", upto);
    check<std::invalid_argument>(m.usable(from, upto), "sequence ", seq, " of ", from.length(),
                                 " tokens no longer holds what its windowed layers see at ", upto,
                                 "; fork within the slack of ", m.slack);
    Sequence s;
    s.salt = from.salt;
    s.writable = upto;
    s.ids.assign(from.ids.begin(), from.ids.begin() + upto);
    s.node = m.ancestor(from.node, from.length() / kPageTokens - upto / kPageTokens);
    m.use(s.node);
    for (int g : m.groups) {
        s.pages[g].assign(from.pages[g].begin(), from.pages[g].begin() + n_pages_for(upto));
        for (int32_t id : s.pages[g])
            if (id != kGivenBack) m.hold(g, id);
    }
    s.held_from = std::min<int>(from.held_from, n_pages_for(upto));
    return m.add(std::move(s));
}

int KvCache::trim(int seq, int upto) {
    Impl& m = *impl_;
    Sequence& s = m.at(seq);
    check<std::invalid_argument>(upto >= 0, "sequence ", seq, " cannot be trimmed to ", upto);
    upto = std::min(upto, s.length());
    if (!m.usable(s, upto)) upto = 0;
    Node* node = m.ancestor(s.node, s.length() / kPageTokens - upto / kPageTokens);
    m.use(node);
    m.stop_using(std::exchange(s.node, node));
    for (int g : m.groups) m.shorten(s, g, n_pages_for(upto));
    s.held_from = std::min<int>(s.held_from, n_pages_for(upto));
    s.ids.resize(upto);
    s.writable = upto;
    return upto;
}

KvCache::Match KvCache::match_prefix(std::span<const int32_t> ids, uint64_t salt) {
    Impl& m = *impl_;
    std::vector<Node*> path;
    int n_pages = 0, held_from = 0;
    int run = 0;  // the windowed pages from here on are all stored
    for (size_t i = 0; (i + 1) * kPageTokens < ids.size(); ++i) {
        auto it = m.nodes.find(NodeKey(i ? path.back() : nullptr, salt, ids, i));
        if (it == m.nodes.end() || (m.has(Global) && it->second.page[Global] == kNone)) break;
        path.push_back(&it->second);
        int n = static_cast<int>(path.size());
        if (m.has(Windowed) && it->second.page[Windowed] == kNone) run = n;
        if (m.has(Windowed) && run > m.first_seen(int64_t{n} * kPageTokens)) continue;
        n_pages = n;
        held_from = run;
    }
    int length = n_pages * kPageTokens;
    Sequence s;
    s.salt = salt;
    s.writable = length;
    s.ids.assign(ids.begin(), ids.begin() + length);
    s.node = n_pages ? path[n_pages - 1] : nullptr;
    m.use(s.node);
    if (m.has(Windowed)) s.held_from = std::max(held_from, m.first_seen(int64_t{length} - m.slack));
    for (int g : m.groups) {
        for (int i = 0; i < n_pages; ++i) {
            bool given_back = g == Windowed && i < s.held_from;
            s.pages[g].push_back(given_back ? kGivenBack : path[i]->page[g]);
            if (!given_back) m.hold(g, path[i]->page[g]);
        }
    }
    return {m.add(std::move(s)), length};
}

int KvCache::restore(int n, int held_from, uint64_t salt) {
    Impl& m = *impl_;
    const int n_pages = n / kPageTokens;
    check<std::invalid_argument>(n > 0 && n % kPageTokens == 0, "n is ", n, ", expected whole pages of ", kPageTokens,
                                 " tokens");
    check<std::invalid_argument>(held_from >= 0 && held_from <= n_pages, "held_from is ", held_from, ", expected 0 to ",
                                 n_pages);
    const int first[2] = {0, held_from};
    for (int g : m.groups)
        check<OutOfMemory>(n_pages - first[g] <= m.pools[g].n_available(), "the KV cache is full: ", n,
                           " restored tokens need ", n_pages - first[g], " pages of ", kPageTokens, " tokens, ",
                           m.pools[g].n_available(), " of ", m.pools[g].pages.size(), " are available");
    Sequence s;
    s.salt = salt;
    s.writable = n;
    if (m.has(Windowed)) s.held_from = held_from;
    for (int g : m.groups) {
        while (static_cast<int64_t>(m.pools[g].free.size()) < n_pages - first[g]) m.evict_oldest(g);
        s.pages[g].assign(first[g], kGivenBack);
        while (static_cast<int>(s.pages[g].size()) < n_pages) s.pages[g].push_back(m.take(g));
    }
    return m.add(std::move(s));
}

void KvCache::free(int seq) {
    Impl& m = *impl_;
    Sequence& s = m.at(seq);
    for (int g : m.groups) m.shorten(s, g, 0);
    m.stop_using(s.node);
    m.sequences.erase(seq);
}

void KvCache::reserve(int seq, int n) {
    Impl& m = *impl_;
    Sequence& s = m.at(seq);
    check<std::invalid_argument>(n >= 0 && n <= INT_MAX - s.length(), "sequence ", seq, " of ", s.length(),
                                 " tokens cannot grow by ", n);
    if (n == 0) return;
    int64_t need[2] = {0, 0};
    for (int g : m.groups) {
        int32_t partial = m.partial_page(s, g);
        bool copies = partial != kNone && m.pools[g].pages[partial].n_holders > 1;
        need[g] = m.n_missing(s, g, n) + copies;
        check<OutOfMemory>(need[g] <= m.pools[g].n_available(), "the KV cache is full: ", n,
                           " more tokens for sequence ", seq, " of ", s.length(), " need ", need[g], " pages of ",
                           kPageTokens, " tokens in the ", g == Global ? "global" : "windowed", " layers, ",
                           m.pools[g].n_available(), " of ", m.pools[g].pages.size(), " are available");
    }
    for (int g : m.groups) {
        while (static_cast<int64_t>(m.pools[g].free.size()) < need[g]) m.evict_oldest(g);
        m.make_own(s, g);
        for (int64_t i = m.n_missing(s, g, n); i > 0; --i) s.pages[g].push_back(m.take(g));
    }
    s.writable = std::max(s.writable, s.length() + n);
}

void KvCache::commit(int seq, std::span<const int32_t> ids) {
    Impl& m = *impl_;
    Sequence& s = m.at(seq);
    check<std::invalid_argument>(static_cast<int64_t>(ids.size()) <= s.writable - s.length(), "sequence ", seq, ": ",
                                 ids.size(), " tokens committed, ", s.writable - s.length(), " reserved");
    int n_full = s.length() / kPageTokens;
    s.ids.insert(s.ids.end(), ids.begin(), ids.end());
    s.writable = s.length();
    for (; n_full < s.length() / kPageTokens; ++n_full) m.register_page(s, n_full);
    for (int g : m.groups) m.shorten(s, g, n_pages_for(s.length()));
    if (!m.has(Windowed)) return;
    for (int end = m.first_seen(int64_t{s.length()} - m.slack); s.held_from < end; ++s.held_from)
        m.let_go(Windowed, std::exchange(s.pages[Windowed][s.held_from], kGivenBack));
}

bool KvCache::can_hold(std::span<const int> seqs, std::span<const int> counts) const {
    Impl& m = *impl_;
    check<std::invalid_argument>(seqs.size() == counts.size(), seqs.size(), " sequences, but ", counts.size(),
                                 " counts");
    for (int g : m.groups) {
        int64_t need = 0;
        std::unordered_map<int32_t, int> n_writers;  // of a shared page; the last holder need not copy it
        for (size_t i = 0; i < seqs.size(); ++i) {
            const Sequence& s = m.at(seqs[i]);
            if (counts[i] <= 0) continue;
            need += m.n_missing(s, g, counts[i]);
            int32_t partial = m.partial_page(s, g);
            if (partial != kNone && ++n_writers[partial] < m.pools[g].pages[partial].n_holders) ++need;
        }
        if (need > m.pools[g].n_available()) return false;
    }
    return true;
}

void KvCache::drop_cached() {
    Impl& m = *impl_;
    for (int g : {Windowed, Global})
        while (!m.pools[g].idle.empty()) m.evict_oldest(g);
}

int KvCache::length(int seq) const { return impl_->at(seq).length(); }
bool KvCache::is_open(int seq) const { return impl_->sequences.count(seq) > 0; }
std::span<const int32_t> KvCache::pages(int seq, Group group) const { return impl_->at(seq).pages[group]; }
Group KvCache::group(int layer) const { return impl_->layers[layer].window ? Windowed : Global; }
const std::vector<KvLayer>& KvCache::layers() const { return impl_->layers; }
KvType KvCache::type() const { return impl_->type; }

std::byte* KvCache::at(int layer, int32_t page) const {
    const Pool& pool = impl_->pools[group(layer)];
    return pool.base + page * pool.page_bytes + impl_->layer_offset[layer];
}

size_t KvCache::part_bytes(int layer) const { return impl_->part_bytes[layer]; }

void KvCache::read(int layer, int32_t page, std::byte* to) const {
    if (PageStore* store = impl_->layers[layer].store)
        store->read(layer, page, to);
    else
        std::memcpy(to, at(layer, page), part_bytes(layer));
}

void KvCache::write(int layer, int32_t page, const std::byte* from) {
    if (PageStore* store = impl_->layers[layer].store)
        store->write(layer, page, from);
    else
        std::memcpy(at(layer, page), from, part_bytes(layer));
}

KvCache::Stats KvCache::stats() const {
    Stats stats{};
    for (int g : {Global, Windowed}) {
        const Pool& pool = impl_->pools[g];
        stats.n_pages[g] = static_cast<int64_t>(pool.pages.size());
        stats.n_free[g] = static_cast<int64_t>(pool.free.size());
        stats.n_cached[g] = pool.n_cached;
        stats.page_bytes[g] = static_cast<int64_t>(pool.page_bytes);
    }
    stats.n_sequences = static_cast<int>(impl_->sequences.size());
    return stats;
}

}  // namespace gemmart
