#include "cpu/executor.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <utility>

#include "cpu/kernels.h"
#include "error.h"
#include "kv_cache.h"

namespace gemmart::cpu {
namespace {

constexpr int kTileTokens = 16;  // tokens of a sequence whose heads are placed as one item of work

struct Layer {
    std::vector<float> attn_norm, q_norm, k_norm, post_attn_norm, ffn_norm, post_ffn_norm;
    Matrix wq, wk, wv, wo, gate, up, down;
};

// A run of tokens of one segment.
struct Tile {
    const Batch::Segment* segment;
    int first_row;  // in the batch
    int n_tokens;
    int position;  // of the first one
};

// Attention of a tile to a run of ranges (kernels.h).
struct Piece {
    Tile tile;
    int range_begin, range_end;
    // Of a tile whose ranges are pieces of their own: their number, which of n_split this is, which split tile it is
    // and where its partials [n_kv_heads, rows, n_split] stand.
    int n_split, index, split_tile;
    size_t first_partial;
};

// The attention of a batch in all layers of one window.
struct AttentionWork {
    std::vector<Piece> pieces;
    std::vector<std::atomic<int>> left;  // [split tiles, n_kv_heads]: pieces that are not done; the last one merges
};

struct Product {
    const Matrix* w;
    float* out;
};

bool reads_integers(const Matrix& w) {
    return panel_bytes(w.dtype, w.n_cols) && w.dtype != DType::F32 && w.dtype != DType::F16 && w.dtype != DType::BF16;
}

std::vector<const Tensor*> matrices(const ModelTensors& tensors) {
    std::vector<const Tensor*> all;
    if (tensors.output) all.push_back(tensors.output);
    for (const LayerTensors& t : tensors.layers) all.insert(all.end(), {t.wq, t.wk, t.wv, t.wo, t.gate, t.up, t.down});
    return all;
}

struct Widths {
    int q = 0, kv = 0, ffn = 0;  // the widest layer's
    int in = 0;                  // the widest input of all products but the last of a layer
    int n_heads = 0, half_head = 0;

    explicit Widths(const Config& config) {
        for (const LayerFacts& l : config.layers) {
            q = std::max(q, l.n_heads * l.head_dim);
            kv = std::max(kv, l.n_kv_heads * l.head_dim);
            ffn = std::max(ffn, l.ffn_dim);
            n_heads = std::max(n_heads, l.n_heads);
            half_head = std::max(half_head, l.head_dim / 2);
        }
        in = std::max(config.dim, q);
    }
};

// How the panels of a product are shared out. With few rows the work is reading: each thread has one long run, since
// the hardware reads ahead in a run only, and what is left is shared out in short ones, so that all end together. With
// many rows all items are alike.
constexpr int kManyRowsPanels = 8;
class PanelItems {
  public:
    // unit: least panels of an item; most: panels that one may have
    PanelItems(int n_panels, int n_threads, int n_rows, int unit, int most = std::numeric_limits<int>::max())
        : n_panels_(n_panels) {
        constexpr int kShortItems = 4;  // a thread
        if (n_rows > kMaxWidth) {
            short_ = std::max(kManyRowsPanels, unit);
            return;
        }
        n_long_ = n_threads;
        long_ = std::min(n_panels / n_threads * 7 / 8, most) / unit * unit;
        const int left = n_panels - n_long_ * long_;
        short_ = std::min(left / (n_threads * kShortItems) + unit, most) / unit * unit;
    }
    int size() const { return n_long_ + (n_panels_ - n_long_ * long_ + short_ - 1) / short_; }
    std::pair<int, int> operator[](int i) const {
        if (i < n_long_) return {i * long_, (i + 1) * long_};
        const int begin = n_long_ * long_ + (i - n_long_) * short_;
        return {begin, std::min(n_panels_, begin + short_)};
    }

  private:
    int n_panels_, n_long_ = 0, long_ = 0, short_;
};

// Tokens of a segment that are few: its attention is split by ranges, since the work is reading the cache.
constexpr int kFewTokens = 8;
// Numbers of gate, and of up, that a thread computes before it applies the activation.
size_t chunk_numbers(int n_batch) { return std::max<size_t>(n_batch * kPanel * kManyRowsPanels, 1 << 16); }

// All that a pass writes.
struct Buffers {
    float *x, *h;                               // [n_batch, dim]: the residual stream; its norm
    float *proj, *attended;                     // [n_batch, dim], [n_batch, widths.q]
    float *q, *k, *v;                           // [n_batch, widths.q], [n_batch, widths.kv] twice
    float *cosines, *sines;                     // [n_ropes, n_batch, widths.half_head]
    ActivationArrays input;                     // of the next products [n_batch, widths.in]
    ActivationArrays act;                       // of the last product of a layer [n_batch, widths.ffn]
    std::vector<std::byte*> scratch;            // a thread
    std::vector<float*> row_partials;           // a thread: [kMaxAttentionRows][partial_size]
    std::vector<float*> queries;                // a thread: [kMaxAttentionRows][head_dim]
    std::vector<std::array<float*, 2>> chunks;  // a thread: gate and up [chunk_numbers]

    // take(bytes): where they stand. Called once to count them, and once to have them.
    template <typename Take>
    Buffers(const Config& config, size_t n_batch, int n_threads, Take take) {
        const Widths w(config);
        const auto floats = [&](size_t count) { return reinterpret_cast<float*>(take(count * sizeof(float))); };
        const auto sums = [&](size_t count) { return reinterpret_cast<int32_t*>(take(count * sizeof(int32_t))); };
        const auto bytes = [&](size_t count) { return reinterpret_cast<int8_t*>(take(count)); };
        const auto activations = [&](size_t n) {
            return ActivationArrays{bytes(n),       bytes(n),       floats(n / 32), sums(n / 32), floats(n / 32),
                                    floats(n / 32), floats(n / 16), sums(n / 32),   sums(n / 16), floats(n)};
        };
        x = floats(n_batch * config.dim), h = floats(n_batch * config.dim);
        proj = floats(n_batch * config.dim), attended = floats(n_batch * w.q);
        q = floats(n_batch * w.q), k = floats(n_batch * w.kv), v = floats(n_batch * w.kv);
        cosines = floats(config.ropes.size() * n_batch * w.half_head);
        sines = floats(config.ropes.size() * n_batch * w.half_head);
        input = activations(n_batch * w.in), act = activations(n_batch * w.ffn);
        for (int i = 0; i < n_threads; ++i) {
            scratch.push_back(take(kScratchBytes));
            row_partials.push_back(floats(kMaxAttentionRows * partial_size(2 * w.half_head)));
            queries.push_back(floats(kMaxAttentionRows * 2 * w.half_head));
            chunks.push_back({floats(chunk_numbers(n_batch)), floats(chunk_numbers(n_batch))});
        }
    }
};

// Panels of w from panel `first` on.
Matrix panels_from(Matrix w, int first) {
    w.data += first * w.stride * (w.packed ? 1 : kPanel);
    w.n_rows -= first * kPanel;
    return w;
}

// The column group that column i of n belongs to.
struct ColumnGroup {
    int begin, width;
};
ColumnGroup column_group(int n, int i) {
    ColumnGroup group{i / kMaxWidth * kMaxWidth, 0};
    for (;; group.begin += group.width) {
        group.width = column_group_width(n - group.begin);
        if (i < group.begin + group.width) return group;
    }
}

// What makes the input of the next products of rows: item(i) for i in [0, n_items).
template <typename Item>
struct RowWork {
    const char* name;
    int n_items;
    Item item;
};
constexpr struct {
    const char* name = "";
    int n_items = 0;
    void item(int) const {}
} kNothing;

ActivationArrays with_terms(ActivationArrays arrays, bool two) {
    if (!two) arrays.q_low = nullptr;
    return arrays;
}

}  // namespace

// Every method with "phase" in its comment is called by all threads of the pool with the same arguments.
//
// A layer has five phases: query, key and value | attention | output | gate and up | down. What stands between the
// products, a row at a time, is done by whoever ends the phase before; only where several rows share it out it is a
// phase of its own.
struct CpuExecutor::Impl {
    std::shared_ptr<const GgufFile> file;
    const Config config;
    const Kernels& kernels;
    ThreadPool pool;
    PhaseTimer phases;
    InputSquares squares;
    const int n_batch;
    const Widths widths;
    const Tensor* embedding;
    Arena arena;
    Buffers buffers;
    std::vector<Layer> layers;
    std::vector<float> output_norm;
    Matrix output;
    std::unique_ptr<const Weights> weights;
    // Activations in two 8-bit terms for every product; those of queries, keys and values always have both: where
    // attention is sharp, two thirds of the error that rounding makes in the logits comes from the first two, which are
    // a small part of the work.
    const bool precise;
    std::vector<std::vector<const std::byte*>> page_lists;  // a thread
    std::vector<float> partials;                            // of split tiles

    // The present pass.
    const Batch* batch = nullptr;
    const KvCache* cache = nullptr;
    bool whole = true;  // all layers run here
    int n = 0;          // rows
    bool few = false;   // no segment has more than kFewTokens: the pieces of attention place its heads
    std::vector<Tile> tiles;
    std::vector<int> positions, all_rows;    // [n]
    std::vector<int> last_rows;              // those that go on behind the last layer's attention, ascending
    std::map<int, AttentionWork> attention;  // by window

    Impl(std::shared_ptr<const GgufFile> file_, const Config& config_, const ModelTensors& tensors, int n_threads,
         int n_batch_, bool precise_, const WeightOptions& options, Loading& loading)
        : file(std::move(file_)),
          config(config_),
          kernels(kernels_for("")),
          pool(n_threads),
          n_batch(n_batch_),
          widths(config),
          embedding(tensors.embedding),
          arena(buffer_bytes(config, n_batch, n_threads)),
          buffers(config, n_batch, n_threads, [this](size_t n_bytes) { return arena.take(n_bytes); }),
          layers(config.layers.size()),
          precise(precise_),
          page_lists(n_threads) {
        std::vector<LoadItem> items;
        for (size_t i = 0; i < layers.size(); ++i) {
            const LayerTensors& t = tensors.layers[i];
            Layer& l = layers[i];
            auto norm = [&](const Tensor* tensor) {
                return tensor ? load_vector(*file, *tensor) : std::vector<float>();
            };
            l.attn_norm = norm(t.attn_norm), l.q_norm = norm(t.q_norm), l.k_norm = norm(t.k_norm);
            l.post_attn_norm = norm(t.post_attn_norm), l.ffn_norm = norm(t.ffn_norm),
            l.post_ffn_norm = norm(t.post_ffn_norm);
            items.insert(items.end(), {{t.wq, &l.wq},
                                       {t.wk, &l.wk},
                                       {t.wv, &l.wv},
                                       {t.wo, &l.wo},
                                       {t.gate, &l.gate},
                                       {t.up, &l.up},
                                       {t.down, &l.down}});
            squares.track(l.wq, {t.wq->name, t.wk->name, t.wv->name});
            squares.track(l.wo, {t.wo->name});
            squares.track(l.gate, {t.gate->name, t.up->name});
            squares.track(l.down, {t.down->name});
        }
        if (tensors.output) {
            output_norm = load_vector(*file, *tensors.output_norm);
            items.push_back({tensors.output, &output});
        }
        weights = std::make_unique<Weights>(*file, items, options, loading, pool);
        output.n_rows = tensors.output ? config.n_vocab : 0;  // without padding
    }

    // ---- Rows

    // Packs n_rows rows of n_cols numbers into buffers.input, each after prepare(i), for products with all of
    // `readers`. row(i): where they stand.
    template <typename Prepare, typename Row>
    auto pack(const char* name, int n_rows, int n_cols, std::initializer_list<const Matrix*> readers, bool two_terms,
              Prepare prepare, Row row) {
        const Matrix* first_reader = *readers.begin();
        const bool integers = std::any_of(readers.begin(), readers.end(), [](auto* w) { return reads_integers(*w); });
        const bool floats = std::any_of(readers.begin(), readers.end(), [](auto* w) { return !reads_integers(*w); });
        // Few rows are items of their own, if what is written stands apart: integers do.
        const int step = n_rows > kMaxWidth || floats ? kMaxWidth : 1;
        const auto item = [=, this](int i) {
            const ActivationArrays input = with_terms(buffers.input, two_terms);
            const int end = std::min(n_rows, (i + 1) * step);
            for (int begin = i * step, n_columns; begin < end; begin += n_columns) {
                const ColumnGroup group = column_group(n_rows, begin);
                n_columns = std::min(step, group.width);
                std::array<const float*, kMaxWidth> columns;
                for (int c = 0; c < n_columns; ++c) {
                    prepare(begin + c);
                    columns[c] = row(begin + c);
                    squares.add(*first_reader, columns[c], 0, n_cols);
                }
                const ActivationArrays to = arrays_at(input, static_cast<size_t>(group.begin) * n_cols);
                if (integers)
                    kernels.quantize(columns.data(), n_columns, group.width, n_cols,
                                     arrays_from(to, begin - group.begin));
                if (floats) kernels.interleave(columns.data(), n_columns, n_cols, to.x);
            }
        };
        return RowWork<decltype(item)>{name, (n_rows + step - 1) / step, item};
    }

    // Phase, or two: item(i) for i in [0, n), then `next`.
    template <typename Item, typename Next>
    void run(int thread, const char* name, int n, Item item, const Next& next) {
        if (next.n_items == 1) {
            pool.each(n, item, [&] { next.item(0); });
            phases.end(thread, name);
        } else {
            pool.each(n, item);
            phases.end(thread, name);
            if (next.n_items == 0) return;
            pool.each(next.n_items, [&](int i) { next.item(i); });
            phases.end(thread, next.name);
        }
    }

    float* residual(int row) const { return buffers.x + static_cast<size_t>(row) * config.dim; }
    float* normed(int i) const { return buffers.h + static_cast<size_t>(i) * config.dim; }

    // Row i of the projections, after its norm if there is one, is added to a row of the residual stream.
    void add_projection(int i, int row, const std::vector<float>& post_norm) const {
        float* p = buffers.proj + static_cast<size_t>(i) * config.dim;
        if (config.post_norms) kernels.rms_norm(p, post_norm.data(), config.dim, config.norm_eps, p);
        kernels.add(residual(row), p, config.dim);
    }

    // The norm of a row of the residual stream becomes row i of h.
    void norm(int i, int row, const std::vector<float>& weight) const {
        kernels.rms_norm(residual(row), weight.data(), config.dim, config.norm_eps, normed(i));
    }

    // From the residual stream to the queries, keys and values of a layer; prepare(i) comes first.
    template <typename Prepare>
    auto pack_layer(int index, Prepare prepare) {
        const Layer& l = layers[index];
        return pack(
            "attention norm", n, config.dim, {&l.wq, &l.wk, &l.wv}, true,
            [this, prepare, &l](int i) { prepare(i), norm(i, i, l.attn_norm); }, [this](int i) { return normed(i); });
    }

    // ---- Products

    // Phase: out [n_rows, w.n_rows] = input × each matrix; then `next`.
    template <typename Next>
    void multiply(int thread, const char* name, int n_rows, const ActivationArrays& input,
                  std::initializer_list<Product> products, const Next& next) {
        int n_panels = 0;
        for (const Product& p : products) n_panels += (p.w->n_rows + kPanel - 1) / kPanel;
        const PanelItems items(n_panels, pool.size(), n_rows, 1);
        const auto item = [&](int i) {
            auto [begin, end] = items[i];  // of all products' panels, one matrix behind the other
            for (const auto& [w, out] : products) {
                const int panels = (w->n_rows + kPanel - 1) / kPanel, first = std::max(begin, 0);
                if (first < std::min(end, panels))
                    multiply_panels(thread, n_rows, input, *w, first, std::min(end, panels), out + first * kPanel,
                                    w->n_rows);
                begin -= panels, end -= panels;
            }
        };
        run(thread, name, items.size(), item, next);
    }

    // out [n_rows, ld_out] <- the rows of panels [begin, end)
    void multiply_panels(int thread, int n_rows, const ActivationArrays& input, const Matrix& w, int begin, int end,
                         float* out, size_t ld_out) {
        weights->each_panels(thread, w, begin, end, [&](const Matrix& panels, int first, int last, int row) {
            kernels.matmul(panels_from(panels, first), {n_rows, w.n_cols, input}, 0, last - first,
                           out + row + (first - begin) * kPanel, ld_out, buffers.scratch[thread]);
        });
    }

    // Phase: buffers.act <- act(gate) · up of n_rows rows, a chunk of columns at a time.
    void multiply_gated(int thread, int n_rows, const ActivationArrays& input, const Layer& l,
                        const ActivationArrays& to) {
        // Two panels are the least: what is rounded together stands in two.
        const PanelItems items((l.gate.n_rows + kPanel - 1) / kPanel, pool.size(), n_rows, 2,
                               static_cast<int>(chunk_numbers(n_batch) / kPanel / n_rows));
        float *const gate = buffers.chunks[thread][0], *const up = buffers.chunks[thread][1];
        pool.each(items.size(), [&](int item) {
            const auto [begin, end] = items[item];
            const int first = begin * kPanel, n_numbers = std::min(end * kPanel, l.gate.n_rows) - first;
            const size_t ld = (end - begin) * kPanel;
            multiply_panels(thread, n_rows, input, l.gate, begin, end, gate, ld);
            multiply_panels(thread, n_rows, input, l.up, begin, end, up, ld);
            for (int c = 0, width; c < n_rows; c += width) {
                width = column_group_width(n_rows - c);
                std::array<const float*, kMaxWidth> columns;
                for (int i = 0; i < width; ++i) {
                    float* g = gate + (c + i) * ld;
                    kernels.gate(config.activation, g, up + (c + i) * ld, n_numbers, g);
                    squares.add(l.down, g, first, n_numbers);
                    columns[i] = g;
                }
                const ActivationArrays at =
                    arrays_at(to, static_cast<size_t>(c) * l.gate.n_rows + static_cast<size_t>(first) * width);
                if (reads_integers(l.down))
                    kernels.quantize(columns.data(), width, width, n_numbers, at);
                else
                    kernels.interleave(columns.data(), width, n_numbers, at.x);
            }
        });
    }

    // ---- Attention

    // Row i of the residual stream and, by its position, the cosines and sines of each rope.
    void embed(int thread, int i) {
        const FormatInfo& format = format_of(embedding->dtype);
        const size_t row_size = row_bytes(format, config.dim);
        std::byte* raw = buffers.scratch[thread];
        file->bytes().read(embedding->offset + batch->tokens[i] * row_size, raw, row_size);
        format.decode(raw, residual(i), config.dim);
        kernels.scale(residual(i), config.embedding_scale, config.dim);
        for (size_t r = 0; r < config.ropes.size(); ++r) {
            const std::vector<double>& inv_freq = config.ropes[r].inv_freq;
            const size_t at = (r * n_batch + i) * widths.half_head;
            for (size_t j = 0; j < inv_freq.size(); ++j) {
                buffers.cosines[at + j] = static_cast<float>(std::cos(positions[i] * inv_freq[j]));
                buffers.sines[at + j] = static_cast<float>(std::sin(positions[i] * inv_freq[j]));
            }
        }
    }

    // Norms and rotates a query or key of a row.
    void place_head(int layer, int row, const std::vector<float>& weight, float* head) {
        const LayerFacts& facts = config.layers[layer];
        const size_t angle = (static_cast<size_t>(facts.rope) * n_batch + row) * widths.half_head;
        if (config.qk_norm) kernels.rms_norm(head, weight.data(), facts.head_dim, config.norm_eps, head);
        kernels.rope(head, buffers.cosines + angle, buffers.sines + angle, facts.head_dim,
                     config.ropes[facts.rope].neox);
    }

    void place_query(int layer, int row, float* query) {
        place_head(layer, row, layers[layer].q_norm, query);
        kernels.scale(query, config.layers[layer].query_scale, config.layers[layer].head_dim);
    }

    // Stores the key and value that token i of a tile has for kv head `kv_head`.
    void store_head(int layer, const Tile& tile, int i, int kv_head) {
        const LayerFacts& facts = config.layers[layer];
        const int row = tile.first_row + i, position = tile.position + i;
        const size_t at = (static_cast<size_t>(row) * facts.n_kv_heads + kv_head) * facts.head_dim;
        place_head(layer, row, layers[layer].k_norm, buffers.k + at);
        const KvHeadLayout layout = kv_head_layout(cache->type(), facts.head_dim);
        const int32_t page = cache->pages(tile.segment->seq, cache->group(layer))[position / kPageTokens];
        kernels.store_kv(cache->type(), layout, facts.head_dim, buffers.k + at, buffers.v + at, position % kPageTokens,
                         cache->at(layer, page) + kv_head * layout.n_bytes);
    }

    // Phase: queries in place, keys and values in the cache.
    void place_all(int layer) {
        const LayerFacts& facts = config.layers[layer];
        pool.each(static_cast<int>(tiles.size()), [&](int t) {
            for (int i = 0; i < tiles[t].n_tokens; ++i) {
                const size_t row = tiles[t].first_row + i;
                for (int head = 0; head < facts.n_heads; ++head)
                    place_query(layer, static_cast<int>(row),
                                buffers.q + (row * facts.n_heads + head) * facts.head_dim);
                for (int head = 0; head < facts.n_kv_heads; ++head) store_head(layer, tiles[t], i, head);
            }
        });
    }

    // Cuts the attention of the batch into pieces, for layers of this window.
    AttentionWork attention_work(int window) {
        constexpr int kPiecesAThread = 4;
        const LayerFacts& facts = config.layers[0];
        const int most = kMaxAttentionRows * facts.n_kv_heads / facts.n_heads;
        const int tile_tokens =
            std::clamp(n * facts.n_kv_heads / (kPiecesAThread * pool.size()), kFewTokens, std::max(most, kFewTokens));
        AttentionWork work;
        size_t n_partials = 0;
        int row = 0, n_split_tiles = 0;
        for (const Batch::Segment& s : batch->segments) {
            for (int i = 0; i < s.n_tokens; i += tile_tokens) {
                const int n_tokens = std::min(tile_tokens, s.n_tokens - i), position = s.start + i;
                Piece piece{{&s, row + i, n_tokens, position}, 0, (position + n_tokens - 1) / kRange + 1, 0, 0, 0, 0};
                if (window && position >= window) piece.range_begin = (position - window + 1) / kRange;
                if (s.n_tokens > kFewTokens) {
                    work.pieces.push_back(piece);
                    continue;
                }
                piece.n_split = piece.range_end - piece.range_begin;
                piece.split_tile = n_split_tiles++;
                piece.first_partial = n_partials;
                n_partials += static_cast<size_t>(n_tokens) * widths.n_heads * piece.n_split;
                for (const int begin = piece.range_begin; piece.index < piece.n_split; ++piece.index) {
                    piece.range_begin = begin + piece.index, piece.range_end = piece.range_begin + 1;
                    work.pieces.push_back(piece);
                }
            }
            row += s.n_tokens;
        }
        partials.resize(std::max(partials.size(), n_partials * partial_size(2 * widths.half_head)));
        work.left = std::vector<std::atomic<int>>(static_cast<size_t>(n_split_tiles) * facts.n_kv_heads);
        for (const Piece& piece : work.pieces)
            for (int head = 0; head < facts.n_kv_heads && piece.n_split; ++head)
                work.left[piece.split_tile * facts.n_kv_heads + head] = piece.n_split;
        return work;
    }

    // attended [n, n_heads × head_dim] <- attention of a piece's queries that share kv head `kv_head`; of a split tile
    // its partials.
    void attend(int thread, const Piece& piece, int kv_head, int layer) {
        const LayerFacts& facts = config.layers[layer];
        const Tile& tile = piece.tile;
        const int group = facts.n_heads / facts.n_kv_heads, n_rows = tile.n_tokens * group, head_dim = facts.head_dim;
        const int range_begin = piece.range_begin * kRange, range_end = piece.range_end * kRange;
        if (few)  // each of the tile's positions lies in the ranges of one piece
            for (int i = std::max(0, range_begin - tile.position);
                 i < std::min(tile.n_tokens, range_end - tile.position); ++i)
                store_head(layer, tile, i, kv_head);
        const KvHeadLayout layout = kv_head_layout(cache->type(), head_dim);
        const std::span<const int32_t> ids = cache->pages(tile.segment->seq, cache->group(layer));
        std::vector<const std::byte*>& pages = page_lists[thread];
        const int first = std::max(facts.window ? tile.position - facts.window + 1 : 0, range_begin);
        const int last = std::min(tile.position + tile.n_tokens, range_end) - 1;
        pages.resize(last / kPageTokens + 1);
        for (int page = first / kPageTokens; page <= last / kPageTokens; ++page)
            pages[page] = cache->at(layer, ids[page]) + kv_head * layout.n_bytes;
        for (int begin = 0; begin < n_rows; begin += kMaxAttentionRows) {
            const float* queries[kMaxAttentionRows];
            int positions[kMaxAttentionRows];
            const int n = std::min(kMaxAttentionRows, n_rows - begin);
            for (int i = 0; i < n; ++i) {
                queries[i] = buffers.q + head_offset(tile, kv_head, begin + i, facts);
                positions[i] = tile.position + (begin + i) / group;
                if (few) {
                    float* own = buffers.queries[thread] + i * head_dim;
                    std::copy_n(queries[i], head_dim, own);
                    place_query(layer, tile.first_row + (begin + i) / group, own);
                    queries[i] = own;
                }
            }
            float* to = buffers.row_partials[thread];
            size_t ld = partial_size(head_dim);
            if (piece.n_split) {
                to = split_partials(piece, kv_head, begin, facts) + piece.index * ld;
                ld *= piece.n_split;
            }
            kernels.attention({cache->type(), layout, head_dim, n, queries, positions, facts.window,
                               config.attention_softcap, pages.data(), piece.range_begin, piece.range_end, to, ld},
                              buffers.scratch[thread]);
            if (piece.n_split) continue;
            for (int i = 0; i < n; ++i)
                kernels.merge(to + i * ld, 1, head_dim,
                              buffers.attended + head_offset(tile, kv_head, begin + i, facts));
        }
    }

    // The n_split partials of row `row` of a kv head.
    float* split_partials(const Piece& piece, int kv_head, int row, const LayerFacts& facts) {
        const int n_rows = piece.tile.n_tokens * (facts.n_heads / facts.n_kv_heads);
        const size_t i = piece.first_partial + static_cast<size_t>(kv_head * n_rows + row) * piece.n_split;
        return partials.data() + i * partial_size(facts.head_dim);
    }

    // Of row `row` of a kv head's queries in q, and of its attention.
    static size_t head_offset(const Tile& tile, int kv_head, int row, const LayerFacts& facts) {
        const int group = facts.n_heads / facts.n_kv_heads;
        const size_t token = tile.first_row + row / group;
        return (token * facts.n_heads + kv_head * group + row % group) * facts.head_dim;
    }

    // Phase: the pieces that have a row of `outputs`, then `next`; the last piece of a split tile merges all.
    template <typename Next>
    void attend_all(int thread, int layer, std::span<const int> outputs, const Next& next) {
        const LayerFacts& facts = config.layers[layer];
        AttentionWork& work = attention.at(facts.window);
        const auto item = [&](int i) {
            const Piece& piece = work.pieces[i / facts.n_kv_heads];
            const int kv_head = i % facts.n_kv_heads, first = piece.tile.first_row;
            const auto wanted = std::lower_bound(outputs.begin(), outputs.end(), first);
            if (!few && (wanted == outputs.end() || *wanted >= first + piece.tile.n_tokens)) return;
            attend(thread, piece, kv_head, layer);
            if (!piece.n_split) return;
            std::atomic<int>& left = work.left[piece.split_tile * facts.n_kv_heads + kv_head];
            if (left.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
            left.store(piece.n_split, std::memory_order_relaxed);  // of the next layer
            for (int row = 0; row < piece.tile.n_tokens * facts.n_heads / facts.n_kv_heads; ++row)
                kernels.merge(split_partials(piece, kv_head, row, facts), piece.n_split, facts.head_dim,
                              buffers.attended + head_offset(piece.tile, kv_head, row, facts));
        };
        run(thread, "attention", static_cast<int>(work.pieces.size()) * facts.n_kv_heads, item, next);
    }

    // ---- A pass

    // The phases of one layer, whose input is packed; then `next`. Behind the attention only the rows of `outputs` go
    // on.
    template <typename Next>
    void run_layer(int thread, int index, std::span<const int> outputs, const Next& next) {
        const Layer& l = layers[index];
        const LayerFacts& facts = config.layers[index];
        const int q_dim = facts.n_heads * facts.head_dim, n_out = static_cast<int>(outputs.size());
        multiply(thread, "q, k, v", n, with_terms(buffers.input, true),
                 {{&l.wq, buffers.q}, {&l.wk, buffers.k}, {&l.wv, buffers.v}}, kNothing);
        if (!few) {
            place_all(index);
            phases.end(thread, "rope, store");
        }
        attend_all(thread, index, outputs,
                   pack(
                       "output quantise", n_out, q_dim, {&l.wo}, precise, [](int) {},
                       [=, this](int i) { return buffers.attended + static_cast<size_t>(outputs[i]) * q_dim; }));
        if (n_out == 0) return;
        multiply(thread, "output", n_out, with_terms(buffers.input, precise), {{&l.wo, buffers.proj}},
                 pack(
                     "ffn norm", n_out, config.dim, {&l.gate, &l.up}, precise,
                     [=, this, &l](int i) {
                         add_projection(i, outputs[i], l.post_attn_norm);
                         norm(i, outputs[i], l.ffn_norm);
                     },
                     [this](int i) { return normed(i); }));
        multiply_gated(thread, n_out, with_terms(buffers.input, precise), l, with_terms(buffers.act, precise));
        phases.end(thread, "gate, up");
        multiply(thread, "down", n_out, with_terms(buffers.act, precise), {{&l.down, buffers.proj}}, next);
    }

    // Logits of the rows that asked, whose norms are packed.
    void run_head(int thread, float* logits) {
        const int n_out = static_cast<int>(batch->outputs.size());
        if (n_out == 0) return;
        multiply(thread, "head", n_out, with_terms(buffers.input, precise), {{&output, logits}}, kNothing);
        if (config.final_softcap == 0) return;
        constexpr int kRun = 8192;
        const int runs = (config.n_vocab + kRun - 1) / kRun;
        pool.each(n_out * runs, [&](int i) {
            const int first = i % runs * kRun;
            kernels.softcap(logits + static_cast<size_t>(i / runs) * config.n_vocab + first,
                            std::min(kRun, config.n_vocab - first), config.final_softcap);
        });
        phases.end(thread, "soft cap");
    }

    // The feed-forward of the last layer is added to a row of the residual stream, if that was not done elsewhere.
    void end_row(int row) const {
        if (!whole) return;
        const auto at = std::lower_bound(last_rows.begin(), last_rows.end(), row) - last_rows.begin();
        add_projection(static_cast<int>(at), row, layers.back().post_ffn_norm);
    }

    // Phase: hidden [n_hidden, dim] <- the states of the rows that asked, behind the last norm.
    void take_hidden(int thread, float* hidden) {
        if (batch->hidden.empty()) return;
        pool.each(static_cast<int>(batch->hidden.size()), [&](int i) {
            const int row = batch->hidden[i];
            end_row(row);
            kernels.rms_norm(residual(row), output_norm.data(), config.dim, config.norm_eps,
                             hidden + static_cast<size_t>(i) * config.dim);
        });
        phases.end(thread, "hidden norm");
    }

    // The embedding and all layers; then `next`. Behind the last layer's attention only the rows of `outputs` go on.
    template <typename Next>
    void run_layers(int thread, std::span<const int> outputs, const Next& next) {
        const auto embedding = [&](int i) { embed(thread, i); };
        if (layers.empty()) return run(thread, "embedding", n, embedding, kNothing);
        const int last = static_cast<int>(layers.size()) - 1;
        run(thread, "embedding", n, embedding, pack_layer(0, [](int) {}));
        for (int index = 0; index < last; ++index)
            run_layer(thread, index, all_rows, pack_layer(index + 1, [this, index](int i) {
                          add_projection(i, i, layers[index].post_ffn_norm);
                      }));
        run_layer(thread, last, outputs, next);
    }

    // The residual stream behind the layers, for what runs elsewhere.
    void run_before(int thread) {
        const auto item = [this](int i) { add_projection(i, i, layers.back().post_ffn_norm); };
        run_layers(thread, all_rows, RowWork<decltype(item)>{"residual", n, item});
    }

    // What the output matrix is multiplied with.
    auto pack_head() {
        return pack(
            "head norm", static_cast<int>(batch->outputs.size()), config.dim, {&output}, precise,
            [this](int i) {
                end_row(batch->outputs[i]);
                norm(i, batch->outputs[i], output_norm);
            },
            [this](int i) { return normed(i); });
    }

    // Behind pack_head().
    void run_outputs(int thread, float* logits, float* hidden) {
        take_hidden(thread, hidden);
        run_head(thread, logits);
    }

    void forward(const Batch& batch_, const KvCache& cache_, float* logits, float* hidden, const Rest& rest) {
        batch = &batch_, cache = &cache_;
        whole = !rest;
        n = static_cast<int>(batch->tokens.size());
        few = true;
        tiles.clear(), positions.clear(), all_rows.clear(), last_rows.clear();
        for (const Batch::Segment& s : batch->segments) {
            few = few && s.n_tokens <= kFewTokens;
            for (int i = 0; i < s.n_tokens; ++i) {
                if (i % kTileTokens == 0)
                    tiles.push_back(
                        {&s, static_cast<int>(positions.size()), std::min(kTileTokens, s.n_tokens - i), s.start + i});
                all_rows.push_back(static_cast<int>(positions.size()));
                positions.push_back(s.start + i);
            }
        }
        std::merge(batch->outputs.begin(), batch->outputs.end(), batch->hidden.begin(), batch->hidden.end(),
                   std::back_inserter(last_rows));
        // Who measures inputs and wants no row wants the last layer's inputs all the same.
        if (squares.on() && last_rows.empty()) last_rows = all_rows;
        attention.clear();
        for (const LayerFacts& l : config.layers)
            if (!attention.count(l.window)) attention.emplace(l.window, attention_work(l.window));
        file->bytes().check_unchanged();
        phases.begin();
        if (whole) {
            pool.run([&](int thread) {
                run_layers(thread, last_rows, pack_head());
                run_outputs(thread, logits, hidden);
            });
        } else {
            pool.run([&](int thread) { run_before(thread); });
            rest(buffers.x);
            if (output.n_rows) {
                phases.begin();
                pool.run([&](int thread) {
                    const auto rows = pack_head();
                    pool.each(rows.n_items, rows.item);
                    phases.end(thread, rows.name);
                    run_outputs(thread, logits, hidden);
                });
            }
        }
        weights->check_unchanged();
    }
};

CpuExecutor::CpuExecutor(std::shared_ptr<const GgufFile> file, const Config& config, const ModelTensors& tensors,
                         int n_threads, int n_batch, bool precise, const WeightOptions& options, Loading& loading)
    : impl_(std::make_unique<Impl>(std::move(file), config, tensors, n_threads, n_batch, precise, options, loading)) {}
CpuExecutor::~CpuExecutor() = default;

void CpuExecutor::forward(const Batch& batch, const KvCache& cache, float* logits, float* hidden, const Rest& rest) {
    impl_->forward(batch, cache, logits, hidden, rest);
}
const Kernels& CpuExecutor::kernels() const { return impl_->kernels; }
PhaseTimer& CpuExecutor::phases() { return impl_->phases; }
InputSquares& CpuExecutor::input_squares() { return impl_->squares; }

size_t packed_weight_bytes(const ModelTensors& tensors) { return packed_bytes(matrices(tensors)); }

size_t mapped_weight_bytes(const GgufFile& file, const ModelTensors& tensors, int n_threads) {
    return n_threads * room_bytes(matrices(tensors)) + copied_bytes(file.bytes(), matrices(tensors));
}

size_t buffer_bytes(const Config& config, int n_batch, int n_threads) {
    size_t total = 0;
    Buffers(config, n_batch, n_threads, [&](size_t n_bytes) {
        total += (n_bytes + 63) / 64 * 64;
        return static_cast<std::byte*>(nullptr);
    });
    return total;
}

}  // namespace gemmart::cpu
