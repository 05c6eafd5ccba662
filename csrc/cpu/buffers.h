// All that the passes of a CPU executor write, but for the KV cache.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/panel_items.h"
#include "decoder.h"

namespace gemmart::cpu {

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

// Numbers of gate, and of up, that a thread computes before it applies the activation.
inline size_t chunk_numbers(int n_batch) { return std::max<size_t>(n_batch * kPanel * kManyRowsPanels, 1 << 16); }

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

}  // namespace gemmart::cpu
