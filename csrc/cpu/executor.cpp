#include "cpu/executor.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <map>

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
    // Of a tile whose ranges are pieces of their own: their number, where its partials [n_kv_heads, rows, n_split]
    // stand and which of n_split this is.
    int n_split;
    size_t first_partial;
    int index;
};

// The attention of a batch in all layers of one window.
struct AttentionWork {
    std::vector<Piece> pieces;
    std::vector<Piece> split;  // tiles with several pieces
};

struct Product {
    const Matrix* w;
    float* out;
};

bool reads_integers(const Matrix& w) {
    return panel_bytes(w.dtype, w.n_cols) && w.dtype != DType::F32 && w.dtype != DType::F16 && w.dtype != DType::BF16;
}

std::vector<const Tensor*> matrices(const ModelTensors& tensors) {
    std::vector<const Tensor*> all{tensors.output};
    for (const LayerTensors& t : tensors.layers) all.insert(all.end(), {t.wq, t.wk, t.wv, t.wo, t.gate, t.up, t.down});
    return all;
}

struct Widths {
    int q = 0, kv = 0, ffn = 0, in = 0;  // the widest layer's; `in`: widest input of a product
    int n_heads = 0, half_head = 0;

    explicit Widths(const Config& config) {
        for (const LayerFacts& l : config.layers) {
            q = std::max(q, l.n_heads * l.head_dim);
            kv = std::max(kv, l.n_kv_heads * l.head_dim);
            ffn = std::max(ffn, l.ffn_dim);
            n_heads = std::max(n_heads, l.n_heads);
            half_head = std::max(half_head, l.head_dim / 2);
        }
        in = std::max({config.dim, q, ffn});
    }
};

// Of the products with both terms that a thread computes before it adds them.
size_t term_numbers(int n_batch) { return std::max<size_t>(2 * n_batch * kPanel * 8, 1 << 17); }

}  // namespace

// Every method with "phase" in its comment is called by all threads of the pool with the same arguments.
struct CpuExecutor::Impl {
    std::shared_ptr<const GgufFile> file;
    const Config config;
    const Kernels& kernels;
    ThreadPool pool;
    PhaseTimer phases;
    const int n_batch;
    const Widths widths;
    const Tensor* embedding;
    Arena buffers;
    std::vector<Layer> layers;
    std::vector<float> output_norm;
    Matrix output;
    std::unique_ptr<const Weights> weights;

    // Rows of the batch.
    float *x, *h, *proj;     // [n_batch, dim], [n_batch, widths.in], [n_batch, dim]
    float *q, *k, *v;        // [n_batch, widths.q], [n_batch, widths.kv] twice
    float *gate, *up;        // [n_batch, widths.ffn]
    float *cosines, *sines;  // [n_ropes, n_batch, widths.half_head]
    ActivationArrays input;  // of the next products [n_batch, n_cols]
    // The same in two terms [2 n_batch, n_cols]: each column group holds some columns rounded to 8 bits, then what
    // rounding took from them, rounded to 8 bits itself. The sum of a product with both is nearly that of the unrounded
    // input. Queries, keys and values always have it: where attention is sharp, two thirds of the error that rounding
    // makes in the logits comes from the first two, which are a small part of the work. With `precise` every product
    // has it.
    ActivationArrays two_terms;
    const bool precise;
    std::vector<std::byte*> scratch;                        // a thread
    std::vector<float*> term_products;                      // a thread: [term_numbers(n_batch)]
    std::vector<float*> row_partials;                       // a thread: [kMaxAttentionRows][partial_size]
    std::vector<std::vector<const std::byte*>> page_lists;  // a thread
    std::vector<float> partials;                            // of split tiles

    Impl(std::shared_ptr<const GgufFile> file_, const Config& config_, const ModelTensors& tensors, int n_threads,
         int n_batch_, bool precise_, const WeightOptions& options, Loading& loading)
        : file(std::move(file_)),
          config(config_),
          kernels(kernels_for("")),
          pool(n_threads),
          n_batch(n_batch_),
          widths(config),
          embedding(tensors.embedding),
          buffers(buffer_bytes(config, n_batch, n_threads)),
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
        }
        output_norm = load_vector(*file, *tensors.output_norm);
        items.push_back({tensors.output, &output});
        weights = std::make_unique<Weights>(*file, items, options, loading, pool);
        output.n_rows = config.n_vocab;  // without padding

        const size_t n = n_batch;
        auto take = [&](size_t count) { return reinterpret_cast<float*>(buffers.take(count * sizeof(float))); };
        x = take(n * config.dim), h = take(n * widths.in), proj = take(n * config.dim);
        q = take(n * widths.q), k = take(n * widths.kv), v = take(n * widths.kv);
        gate = take(n * widths.ffn), up = take(n * widths.ffn);
        cosines = take(config.ropes.size() * n * widths.half_head),
        sines = take(config.ropes.size() * n * widths.half_head);
        auto take_input = [&](size_t n_numbers) {
            auto take_sums = [&](size_t count) { return reinterpret_cast<int32_t*>(take(count)); };
            return ActivationArrays{reinterpret_cast<int8_t*>(buffers.take(n_numbers)),
                                    take(n_numbers / 32),
                                    take(n_numbers / 32),
                                    take(n_numbers / 16),
                                    take_sums(n_numbers / 32),
                                    take_sums(n_numbers / 16),
                                    nullptr};
        };
        input = take_input(n * widths.in), two_terms = take_input(2 * n * widths.in);
        input.x = take(n * widths.in);
        for (int i = 0; i < n_threads; ++i) {
            scratch.push_back(buffers.take(kScratchBytes));
            term_products.push_back(take(term_numbers(n_batch)));
            row_partials.push_back(take(kMaxAttentionRows * partial_size(2 * widths.half_head)));
        }
    }

    // Phase: item(first row, width) for each column group of n rows.
    template <typename F>
    void each_group(int n, F item) {
        const int n_whole = n / kMaxWidth, n_groups = n_whole + std::popcount(static_cast<unsigned>(n % kMaxWidth));
        pool.each(n_groups, [&](int i) {
            int column = std::min(i, n_whole) * kMaxWidth;
            for (int skip = i - n_whole; skip > 0; --skip) column += column_group_width(n - column);
            item(column, column_group_width(n - column));
        });
    }

    // Phases: packs rows [n, n_cols], each after prepare(row), for products with all of `readers`; with two terms, the
    // rows are overwritten.
    template <typename F>
    void pack(int n, float* rows, int n_cols, std::initializer_list<const Matrix*> readers, bool terms, F prepare) {
        const auto columns_of = [&](int row, int width) {
            std::array<const float*, kMaxWidth> columns;
            for (int i = 0; i < width; ++i) columns[i] = rows + static_cast<size_t>(row + i) * n_cols;
            return columns;
        };
        const auto interleave = [&](int row, int width) {
            kernels.interleave(columns_of(row, width).data(), width, n_cols,
                               input.x + static_cast<size_t>(row) * n_cols);
        };
        const bool integers = std::any_of(readers.begin(), readers.end(), [](auto* w) { return reads_integers(*w); });
        const bool floats = std::any_of(readers.begin(), readers.end(), [](auto* w) { return !reads_integers(*w); });
        if (!integers || !terms) {
            each_group(n, [&](int row, int width) {
                for (int i = row; i < row + width; ++i) prepare(i);
                if (floats) interleave(row, width);
                if (!integers) return;
                const ActivationArrays to = arrays_at(input, static_cast<size_t>(row) * n_cols);
                kernels.quantize(columns_of(row, width).data(), width, width, n_cols, to);
            });
            return;
        }
        if (floats) {
            each_group(n, [&](int row, int width) {
                for (int i = row; i < row + width; ++i) prepare(i);
                interleave(row, width);
            });
        }
        each_group(2 * n, [&](int column, int width) {
            const int row = column / 2, n_rows = width / 2;
            if (!floats)
                for (int i = row; i < row + n_rows; ++i) prepare(i);
            const auto columns = columns_of(row, n_rows);
            const ActivationArrays to = arrays_at(two_terms, static_cast<size_t>(column) * n_cols);
            kernels.quantize(columns.data(), n_rows, width, n_cols, to);
            for (int c = 0; c < n_rows; ++c) {
                float* rest = rows + static_cast<size_t>(row + c) * n_cols;
                for (int g = 0; g < n_cols / kGroup; ++g)
                    for (int i = 0; i < kGroup; ++i)
                        rest[g * kGroup + i] -= to.d[g * width + c] * to.q[(g * width + c) * kGroup + i];
            }
            kernels.quantize(columns.data(), n_rows, width, n_cols, arrays_from(to, n_rows));
        });
    }

    // Phase: out [n, w.n_rows] = packed input × each matrix.
    void multiply(int thread, int n, bool terms, std::initializer_list<Product> products) {
        constexpr int kItemsAThread = 32;
        int n_panels = 0;
        for (const Product& p : products) n_panels += (p.w->n_rows + kPanel - 1) / kPanel;
        const int grain = std::max(n_panels / (pool.size() * kItemsAThread), n > kMaxWidth ? 8 : 1);
        int n_items = 0;
        for (const Product& p : products) n_items += ((p.w->n_rows + kPanel - 1) / kPanel + grain - 1) / grain;
        pool.each(n_items, [&](int item) {
            for (const auto& [w, out] : products) {
                const int panels = (w->n_rows + kPanel - 1) / kPanel, items = (panels + grain - 1) / grain;
                if (item >= items) {
                    item -= items;
                    continue;
                }
                const int begin = item * grain, end = std::min(panels, begin + grain);
                const bool both = terms && reads_integers(*w);
                weights->each_panels(thread, *w, begin, end, [&](const Matrix& panels, int first, int last, int row) {
                    if (both)
                        multiply_terms(thread, n, panels, first, last, out + row, w->n_rows);
                    else
                        kernels.matmul(panels, {n, w->n_cols, input}, first, last, out + row, w->n_rows,
                                       scratch[thread]);
                });
                return;
            }
        });
    }

    // Panels [begin, end) of a product in two terms: products with both, then their sums.
    void multiply_terms(int thread, int n, const Matrix& w, int begin, int end, float* out, size_t ld_out) {
        float* terms = term_products[thread];
        const int step = static_cast<int>(term_numbers(n_batch) / (2 * static_cast<size_t>(n) * kPanel));
        for (int first = begin; first < end; first += step) {
            const int last = std::min(first + step, end), row = first * kPanel;
            const int n_rows = std::min(last * kPanel, w.n_rows) - row;
            // the kernel counts rows from the first panel that it is given
            Matrix part = w;
            part.data += first * w.stride * (w.packed ? 1 : kPanel);
            part.n_rows = n_rows;
            kernels.matmul(part, {2 * n, w.n_cols, two_terms}, 0, last - first, terms, n_rows, scratch[thread]);
            for (int column = 0, width; column < 2 * n; column += width) {
                width = column_group_width(2 * n - column);
                for (int c = 0; c < width / 2; ++c) {
                    const float* sum = terms + static_cast<size_t>(column + c) * n_rows;
                    const float* rest = sum + static_cast<size_t>(width / 2) * n_rows;
                    float* to = out + (column / 2 + c) * ld_out + row;
                    for (int r = 0; r < n_rows; ++r) to[r] = sum[r] + rest[r];
                }
            }
        }
    }

    // x and, by position, the cosines and sines of each rope.
    void begin(const Batch& batch) {
        const int n = static_cast<int>(batch.tokens.size());
        const FormatInfo& format = format_of(embedding->dtype);
        const size_t row = row_bytes(format, config.dim);
        std::vector<int> positions;
        for (const Batch::Segment& s : batch.segments)
            for (int i = 0; i < s.n_tokens; ++i) positions.push_back(s.start + i);
        file->check_unchanged();
        pool.run([&](int thread) {
            pool.each(n, [&](int i) {
                auto* raw = scratch[thread];
                float* to = x + static_cast<size_t>(i) * config.dim;
                file->read(embedding->offset + batch.tokens[i] * row, raw, row);
                format.decode(raw, to, config.dim);
                kernels.scale(to, config.embedding_scale, config.dim);
                for (size_t r = 0; r < config.ropes.size(); ++r) {
                    const std::vector<double>& inv_freq = config.ropes[r].inv_freq;
                    const size_t at = (r * n_batch + i) * widths.half_head;
                    for (size_t j = 0; j < inv_freq.size(); ++j) {
                        cosines[at + j] = static_cast<float>(std::cos(positions[i] * inv_freq[j]));
                        sines[at + j] = static_cast<float>(std::sin(positions[i] * inv_freq[j]));
                    }
                }
            });
        });
    }

    // Norms and rotates the heads of one token, stores its key and value.
    void place_heads(const Tile& tile, int i, int layer, const KvCache& cache) {
        const LayerFacts& facts = config.layers[layer];
        const RopeFacts& rope = config.ropes[facts.rope];
        const int row = tile.first_row + i, position = tile.position + i, head_dim = facts.head_dim;
        const size_t angle = (static_cast<size_t>(facts.rope) * n_batch + row) * widths.half_head;
        auto prepare = [&](float* head, const std::vector<float>& norm) {
            if (config.qk_norm) kernels.rms_norm(head, norm.data(), head_dim, config.norm_eps, head);
            kernels.rope(head, cosines + angle, sines + angle, head_dim, rope.neox);
        };
        const int q_dim = facts.n_heads * head_dim, kv_dim = facts.n_kv_heads * head_dim;
        float* queries = q + static_cast<size_t>(row) * q_dim;
        float* keys = k + static_cast<size_t>(row) * kv_dim;
        const float* values = v + static_cast<size_t>(row) * kv_dim;
        for (int head = 0; head < facts.n_heads; ++head) prepare(queries + head * head_dim, layers[layer].q_norm);
        kernels.scale(queries, facts.query_scale, q_dim);
        const KvHeadLayout layout = kv_head_layout(cache.type(), head_dim);
        const int32_t page = cache.pages(tile.segment->seq, cache.group(layer))[position / kPageTokens];
        std::byte* part = cache.at(layer, page);
        for (int head = 0; head < facts.n_kv_heads; ++head, part += layout.n_bytes) {
            prepare(keys + head * head_dim, layers[layer].k_norm);
            kernels.store_kv(cache.type(), layout, head_dim, keys + head * head_dim, values + head * head_dim,
                             position % kPageTokens, part);
        }
    }

    // Cuts the attention of a batch into pieces, for layers of this window. Tiles of few tokens are split by ranges,
    // since their work is reading the cache.
    AttentionWork attention_work(const Batch& batch, int window) {
        constexpr int kFewTokens = 8, kPiecesAThread = 4;
        const LayerFacts& facts = config.layers[0];
        const int n = static_cast<int>(batch.tokens.size()),
                  most = kMaxAttentionRows * facts.n_kv_heads / facts.n_heads;
        const int tile_tokens =
            std::clamp(n * facts.n_kv_heads / (kPiecesAThread * pool.size()), kFewTokens, std::max(most, kFewTokens));
        AttentionWork work;
        size_t n_partials = 0;
        int row = 0;
        for (const Batch::Segment& s : batch.segments) {
            for (int i = 0; i < s.n_tokens; i += tile_tokens) {
                const int n_tokens = std::min(tile_tokens, s.n_tokens - i), position = s.start + i;
                Piece piece{{&s, row + i, n_tokens, position}, 0, (position + n_tokens - 1) / kRange + 1, 0, 0, 0};
                if (window && position >= window) piece.range_begin = (position - window + 1) / kRange;
                if (s.n_tokens <= kFewTokens) {
                    piece.n_split = piece.range_end - piece.range_begin;
                    piece.first_partial = n_partials;
                    n_partials += static_cast<size_t>(n_tokens) * widths.n_heads * piece.n_split;
                }
                (piece.n_split ? work.split : work.pieces).push_back(piece);
            }
            row += s.n_tokens;
        }
        partials.resize(std::max(partials.size(), n_partials * partial_size(2 * widths.half_head)));
        for (const Piece& whole : work.split)
            for (int i = 0; i < whole.n_split; ++i) {
                const int range = whole.range_begin + i;
                work.pieces.push_back({whole.tile, range, range + 1, whole.n_split, whole.first_partial, i});
            }
        return work;
    }

    // h [n, n_heads × head_dim] <- attention of a piece's queries that share kv head `kv_head`; of a split tile its
    // partials.
    void attend(int thread, const Piece& piece, int kv_head, int layer, const KvCache& cache) {
        const LayerFacts& facts = config.layers[layer];
        const Tile& tile = piece.tile;
        const int group = facts.n_heads / facts.n_kv_heads, n_rows = tile.n_tokens * group;
        const KvHeadLayout layout = kv_head_layout(cache.type(), facts.head_dim);
        const std::span<const int32_t> ids = cache.pages(tile.segment->seq, cache.group(layer));
        std::vector<const std::byte*>& pages = page_lists[thread];
        const int first = std::max(facts.window ? tile.position - facts.window + 1 : 0, piece.range_begin * kRange);
        const int last = std::min(tile.position + tile.n_tokens, piece.range_end * kRange) - 1;
        pages.resize(last / kPageTokens + 1);
        for (int page = first / kPageTokens; page <= last / kPageTokens; ++page)
            pages[page] = cache.at(layer, ids[page]) + kv_head * layout.n_bytes;
        for (int begin = 0; begin < n_rows; begin += kMaxAttentionRows) {
            const float* queries[kMaxAttentionRows];
            int positions[kMaxAttentionRows];
            const int n = std::min(kMaxAttentionRows, n_rows - begin);
            for (int i = 0; i < n; ++i) {
                queries[i] = q + head_offset(tile, kv_head, begin + i, facts);
                positions[i] = tile.position + (begin + i) / group;
            }
            float* to = row_partials[thread];
            size_t ld = partial_size(facts.head_dim);
            if (piece.n_split) {
                to = split_partials(piece, kv_head, begin, facts) + piece.index * ld;
                ld *= piece.n_split;
            }
            kernels.attention({cache.type(), layout, facts.head_dim, n, queries, positions, facts.window,
                               config.attention_softcap, pages.data(), piece.range_begin, piece.range_end, to, ld},
                              scratch[thread]);
            if (piece.n_split) continue;
            for (int i = 0; i < n; ++i)
                kernels.merge(to + i * ld, 1, facts.head_dim, h + head_offset(tile, kv_head, begin + i, facts));
        }
    }

    // The n_split partials of row `row` of a kv head.
    float* split_partials(const Piece& piece, int kv_head, int row, const LayerFacts& facts) {
        const int n_rows = piece.tile.n_tokens * (facts.n_heads / facts.n_kv_heads);
        const size_t i = piece.first_partial + static_cast<size_t>(kv_head * n_rows + row) * piece.n_split;
        return partials.data() + i * partial_size(facts.head_dim);
    }

    // Of row `row` of a kv head's queries in q, and of its attention in h.
    static size_t head_offset(const Tile& tile, int kv_head, int row, const LayerFacts& facts) {
        const int group = facts.n_heads / facts.n_kv_heads;
        const size_t token = tile.first_row + row / group;
        return (token * facts.n_heads + kv_head * group + row % group) * facts.head_dim;
    }

    // Phases: h <- attention of the queries q.
    void attend_all(int thread, int layer, const AttentionWork& work, const KvCache& cache) {
        const LayerFacts& facts = config.layers[layer];
        const auto each = [&](const std::vector<Piece>& pieces, auto item) {
            pool.each(static_cast<int>(pieces.size()) * facts.n_kv_heads,
                      [&](int i) { item(pieces[i / facts.n_kv_heads], i % facts.n_kv_heads); });
        };
        each(work.pieces, [&](const Piece& piece, int kv_head) { attend(thread, piece, kv_head, layer, cache); });
        if (work.split.empty()) return;
        each(work.split, [&](const Piece& whole, int kv_head) {
            const int n_rows = whole.tile.n_tokens * facts.n_heads / facts.n_kv_heads;
            for (int i = 0; i < n_rows; ++i)
                kernels.merge(split_partials(whole, kv_head, i, facts), whole.n_split, facts.head_dim,
                              h + head_offset(whole.tile, kv_head, i, facts));
        });
    }

    // The phases of one layer.
    void run_layer(int thread, int n, int index, const std::vector<Tile>& tiles,
                   const std::map<int, AttentionWork>& attention, const KvCache& cache) {
        const Layer& l = layers[index];
        const LayerFacts& facts = config.layers[index];
        const int dim = config.dim, q_dim = facts.n_heads * facts.head_dim, ffn = facts.ffn_dim;
        const int n_tiles = static_cast<int>(tiles.size());
        // A row of the residual stream takes in `proj`, and is normed into h.
        auto add_projection = [&](int row, const std::vector<float>& post_norm) {
            float* p = proj + static_cast<size_t>(row) * dim;
            if (config.post_norms) kernels.rms_norm(p, post_norm.data(), dim, config.norm_eps, p);
            kernels.add(x + static_cast<size_t>(row) * dim, p, dim);
        };
        auto norm = [&](int row, const std::vector<float>& weight) {
            kernels.rms_norm(x + static_cast<size_t>(row) * dim, weight.data(), dim, config.norm_eps,
                             h + static_cast<size_t>(row) * dim);
        };

        pack(n, h, dim, {&l.wq, &l.wk, &l.wv}, true, [&](int i) { norm(i, l.attn_norm); });
        phases.end(thread, "attention norm");
        multiply(thread, n, true, {{&l.wq, q}, {&l.wk, k}, {&l.wv, v}});
        phases.end(thread, "q, k, v");
        pool.each(n_tiles, [&](int i) {
            for (int t = 0; t < tiles[i].n_tokens; ++t) place_heads(tiles[i], t, index, cache);
        });
        phases.end(thread, "rope, store");
        attend_all(thread, index, attention.at(facts.window), cache);
        phases.end(thread, "attention");
        pack(n, h, q_dim, {&l.wo}, precise, [](int) {});
        phases.end(thread, "output quantise");
        multiply(thread, n, precise, {{&l.wo, proj}});
        phases.end(thread, "output");
        pack(n, h, dim, {&l.gate, &l.up}, precise, [&](int i) {
            add_projection(i, l.post_attn_norm);
            norm(i, l.ffn_norm);
        });
        phases.end(thread, "ffn norm");
        multiply(thread, n, precise, {{&l.gate, gate}, {&l.up, up}});
        phases.end(thread, "gate, up");
        pack(n, gate, ffn, {&l.down}, precise, [&](int i) {
            const size_t at = static_cast<size_t>(i) * ffn;
            kernels.gate(config.activation, gate + at, up + at, ffn, gate + at);
        });
        phases.end(thread, "activation");
        multiply(thread, n, precise, {{&l.down, proj}});
        phases.end(thread, "down");
        pool.each(n, [&](int i) { add_projection(i, l.post_ffn_norm); });
        phases.end(thread, "residual");
    }

    // Logits of the rows that asked.
    void run_head(int thread, const std::vector<int>& outputs, float* logits) {
        const int n = static_cast<int>(outputs.size()), dim = config.dim;
        if (n == 0) return;
        pack(n, h, dim, {&output}, precise, [&](int i) {
            kernels.rms_norm(x + static_cast<size_t>(outputs[i]) * dim, output_norm.data(), dim, config.norm_eps,
                             h + static_cast<size_t>(i) * dim);
        });
        phases.end(thread, "head norm");
        multiply(thread, n, precise, {{&output, logits}});
        phases.end(thread, "head");
        if (config.final_softcap == 0) return;
        constexpr int kRun = 8192;
        const int runs = (config.n_vocab + kRun - 1) / kRun;
        pool.each(n * runs, [&](int i) {
            const int first = i % runs * kRun;
            kernels.softcap(logits + static_cast<size_t>(i / runs) * config.n_vocab + first,
                            std::min(kRun, config.n_vocab - first), config.final_softcap);
        });
        phases.end(thread, "soft cap");
    }

    void forward(const Batch& batch, const KvCache& cache, float* logits) {
        const int n = static_cast<int>(batch.tokens.size());
        std::vector<Tile> tiles;
        int row = 0;
        for (const Batch::Segment& s : batch.segments) {
            for (int i = 0; i < s.n_tokens; i += kTileTokens)
                tiles.push_back({&s, row + i, std::min(kTileTokens, s.n_tokens - i), s.start + i});
            row += s.n_tokens;
        }
        std::map<int, AttentionWork> attention;  // by window
        for (const LayerFacts& l : config.layers)
            if (!attention.count(l.window)) attention.emplace(l.window, attention_work(batch, l.window));
        phases.begin();
        begin(batch);
        phases.end(0, "embedding");
        pool.run([&](int thread) {
            for (size_t i = 0; i < layers.size(); ++i)
                run_layer(thread, n, static_cast<int>(i), tiles, attention, cache);
            run_head(thread, batch.outputs, logits);
        });
        weights->check_unchanged();
    }
};

CpuExecutor::CpuExecutor(std::shared_ptr<const GgufFile> file, const Config& config, const ModelTensors& tensors,
                         int n_threads, int n_batch, bool precise, const WeightOptions& options, Loading& loading)
    : impl_(std::make_unique<Impl>(std::move(file), config, tensors, n_threads, n_batch, precise, options, loading)) {}
CpuExecutor::~CpuExecutor() = default;

void CpuExecutor::forward(const Batch& batch, const KvCache& cache, float* logits) {
    impl_->forward(batch, cache, logits);
}
const Kernels& CpuExecutor::kernels() const { return impl_->kernels; }
PhaseTimer& CpuExecutor::phases() { return impl_->phases; }

size_t packed_weight_bytes(const ModelTensors& tensors) { return packed_bytes(matrices(tensors)); }

size_t mapped_weight_bytes(const ModelTensors& tensors, int n_threads) {
    return n_threads * room_bytes(matrices(tensors));
}

size_t buffer_bytes(const Config& config, int n_batch, int n_threads) {
    const Widths w(config);
    auto input = [](size_t n_cols) { return n_cols / 4 + 3 * (n_cols / 32) + 2 * (n_cols / 16); };
    const size_t numbers = 2 * config.dim + w.in + w.q + 2 * w.kv + 2 * w.ffn +  // rows
                           2 * config.ropes.size() * w.half_head + 3 * input(w.in) + w.in;
    constexpr size_t kRounding = 64 * 32;  // each of the buffers begins at a multiple of 64
    const size_t row_partials = kMaxAttentionRows * partial_size(2 * w.half_head) * sizeof(float);
    const size_t terms = term_numbers(n_batch) * sizeof(float);
    return numbers * sizeof(float) * n_batch + n_threads * (kScratchBytes + row_partials + terms) + kRounding;
}

}  // namespace gemmart::cpu
