// Storing keys and values, and attention over pages, on the vectors of simd_<isa>.h.
//
// Rows go in tiles of up to kTileRows, which share what is read from a page. Both products, scores = queries · keys and
// outputs = weights · values, are one small kernel, multiply(): rows × two vectors of columns stay in registers, each
// number of the left side is broadcast. Keys stand transposed, so that a column is a position; of the values a column
// is a component. Each output is one chain of operations in order of position, so tiles do not show in the results.
//
// Slots that a row does not see may hold anything, NaN too. Their scores are replaced, and multiply() runs over the
// slots that all rows of the tile see, then over what single rows see besides.
//
// Measured on one core of an EPYC (Zen 4; 113 GFLOP/s in FMA alone), 512 tokens of prefill, head_dim 256, F16, 2 rows a
// token, cap 50: 71 GFLOP/s with AVX-512, 73 with AVX2; decoding at position 511 reads the cache at 31 and 23 GB/s.
#pragma once

#include <cstring>

#include "cpu/convert.h"
#include "cpu/simd_math.h"
#include "cpu/tables.h"

namespace gemmart::cpu {
namespace {

constexpr int kColumns = 2 * kLanes;  // of multiply()
constexpr float kInfinity = __builtin_inff();

template <KvType type>
constexpr int kElementBytes = type == KvType::F32    ? 4
                              : type == KvType::Q8_0 ? 1
                                                     : 2;

template <KvType type>
Vec load_elements(const std::byte* base, int index) {
    const std::byte* p = base + index * kElementBytes<type>;
    if constexpr (type == KvType::F32) return load(reinterpret_cast<const float*>(p));
    if constexpr (type == KvType::F16) return load_half(p);
    if constexpr (type == KvType::BF16) return load_bfloat16(p);
    if constexpr (type == KvType::Q8_0) return load_int8(p);
}

template <KvType type>
struct Keys {
    const std::byte* keys;  // [head_dim][kPageTokens]
    const float* scales;    // [head_dim / 32][kPageTokens]

    Vec operator()(int component, int position) const {
        const Vec key = load_elements<type>(keys, component * kPageTokens + position);
        if constexpr (type == KvType::Q8_0) return key * load(scales + component / 32 * kPageTokens + position);
        return key;
    }
};

template <KvType type>
struct Values {
    const std::byte* values;  // [kPageTokens][dim]
    const float* scales;      // [kPageTokens][dim / 32]
    int dim;

    Vec operator()(int position, int component) const {
        const Vec value = load_elements<type>(values, position * dim + component);
        if constexpr (type == KvType::Q8_0) return value * splat(scales[position * (dim / 32) + component / 32]);
        return value;
    }
};

// sums[r · ld + column] += Σ_k left[r][k] · right(k, column), k in [begin, end) in order, columns in [0, n_columns).
template <int kRows, class Right>
void multiply(const float* const* left, const Right& right, int begin, int end, int n_columns, float* sums, size_t ld) {
    for (int column = 0; column < n_columns; column += kColumns) {
        Vec sum[kRows][2];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            sum[r][0] = load(sums + r * ld + column);
            sum[r][1] = load(sums + r * ld + column + kLanes);
        }
        for (int k = begin; k < end; ++k) {
            const Vec right0 = right(k, column), right1 = right(k, column + kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const Vec factor = splat(left[r][k]);
                sum[r][0] = fma(factor, right0, sum[r][0]);
                sum[r][1] = fma(factor, right1, sum[r][1]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            store(sums + r * ld + column, sum[r][0]);
            store(sums + r * ld + column + kLanes, sum[r][1]);
        }
    }
}

// The slots of a page that a row sees.
struct Slots {
    int begin, end;
};

// A row's softmax so far.
struct Running {
    float max = -kInfinity;
    Vec total = splat(0);  // in lanes: slot mod kLanes
};

// Scores become weights relative to the new maximum; what the row does not see gets weight 0. Returns the factor that
// brings what was summed before to the new maximum.
float weigh(Slots seen, float* scores, Running& running) {
    const uint32_t bits = static_cast<uint32_t>((uint64_t{1} << seen.end) - (uint64_t{1} << seen.begin));
    Vec largest = splat(running.max);
    for (int i = 0; i < kPageTokens; i += kLanes) {
        const Vec score = keep(load(scores + i), bits >> i, -kInfinity);
        largest = max(largest, score);
        store(scores + i, score);
    }
    const float before = running.max;
    running.max = largest_of(largest);
    const Vec shrink = exp(splat(before - running.max));
    running.total = running.total * shrink;
    for (int i = 0; i < kPageTokens; i += kLanes) {
        const Vec weight = keep(exp(load(scores + i) - splat(running.max)), bits >> i, 0);
        running.total = running.total + weight;
        store(scores + i, weight);
    }
    float lanes[kLanes];
    store(lanes, shrink);
    return lanes[0];
}

template <KvType type, int kRows>
void add_values(const float* const* weights, const Values<type>& values, const Slots* seen, int n_columns, float* sums,
                size_t ld) {
    int begin = seen[0].begin, end = seen[0].end;  // what all rows see
    for (int r = 1; r < kRows; ++r) {
        begin = seen[r].begin > begin ? seen[r].begin : begin;
        end = seen[r].end < end ? seen[r].end : end;
    }
    if (begin > end) begin = end = kPageTokens;
    auto alone = [&](int r, int from, int to) {
        from = from > seen[r].begin ? from : seen[r].begin;
        to = to < seen[r].end ? to : seen[r].end;
        if (from < to) multiply<1>(weights + r, values, from, to, n_columns, sums + r * ld, ld);
    };
    for (int r = 0; r < kRows; ++r) alone(r, 0, begin);
    multiply<kRows>(weights, values, begin, end, n_columns, sums, ld);
    for (int r = 0; r < kRows; ++r) alone(r, end, kPageTokens);
}

template <KvType type, int kRows>
void attend(const AttentionJob& job, int row, std::byte* scratch) {
    const int head_dim = job.head_dim, tail = head_dim % 32, full = head_dim - tail;
    const size_t ld = full + (tail ? 32 : 0);
    float* sums = reinterpret_cast<float*>(scratch);                // [kRows][ld]
    std::byte* tail_values = scratch + kRows * ld * sizeof(float);  // [kPageTokens][32]: the last components, padded
    std::memset(scratch, 0, kRows * ld * sizeof(float) + kPageTokens * 32 * sizeof(float));

    const float* queries[kRows];
    const float* weights[kRows];
    alignas(64) float scores[kRows][kPageTokens];
    Running running[kRows];
    int first[kRows], last[kRows], first_page = 0x7fffffff, last_page = 0;
    for (int r = 0; r < kRows; ++r) {
        queries[r] = job.queries[row + r];
        weights[r] = scores[r];
        last[r] = job.positions[row + r];
        first[r] = job.window && last[r] >= job.window ? last[r] - job.window + 1 : 0;
        first_page = first[r] / kPageTokens < first_page ? first[r] / kPageTokens : first_page;
        last_page = last[r] / kPageTokens > last_page ? last[r] / kPageTokens : last_page;
    }

    for (int page = first_page; page <= last_page; ++page) {
        Slots seen[kRows];
        bool any = false;
        for (int r = 0; r < kRows; ++r) {
            const int begin = first[r] - page * kPageTokens, end = last[r] + 1 - page * kPageTokens;
            seen[r] = {begin > 0 ? begin : 0, end < kPageTokens ? end : kPageTokens};
            if (seen[r].begin >= seen[r].end) seen[r] = {0, 0};
            any = any || seen[r].end > 0;
        }
        if (!any) continue;
        const std::byte* part = job.pages[page];
        const Keys<type> keys{part + job.layout.keys, reinterpret_cast<const float*>(part + job.layout.key_scales)};
        const Values<type> values{part + job.layout.values,
                                  reinterpret_cast<const float*>(part + job.layout.value_scales), head_dim};

        std::memset(scores, 0, sizeof scores);
        multiply<kRows>(queries, keys, 0, head_dim, kPageTokens, scores[0], kPageTokens);
        if (job.softcap)
            for (int i = 0; i < kRows * kPageTokens; i += kLanes)
                store(scores[0] + i, capped(load(scores[0] + i), job.softcap));
        for (int r = 0; r < kRows; ++r) {
            if (seen[r].end == 0) continue;
            const float shrink = weigh(seen[r], scores[r], running[r]);
            if (shrink != 1)
                for (size_t i = 0; i < ld; i += kLanes)
                    store(sums + r * ld + i, load(sums + r * ld + i) * splat(shrink));
        }

        add_values<type, kRows>(weights, values, seen, full, sums, ld);
        if (tail) {
            constexpr int kBytes = kElementBytes<type>;
            for (int slot = 0; slot < kPageTokens; ++slot)
                std::memcpy(tail_values + slot * 32 * kBytes, values.values + (slot * head_dim + full) * kBytes,
                            tail * kBytes);
            add_values<type, kRows>(weights, {tail_values, nullptr, 32}, seen, 32, sums + full, ld);
        }
    }

    for (int r = 0; r < kRows; ++r) {
        float lanes[kLanes];
        store(lanes, running[r].total);
        const Vec total = splat(tree_sum(lanes, kLanes));
        float* out = job.outputs[row + r];
        for (int i = 0; i < head_dim; i += kLanes) store_n(out + i, load(sums + r * ld + i) / total, head_dim - i);
    }
}

template <KvType type>
void attend_all(const AttentionJob& job, std::byte* scratch) {
    int row = 0;
    for (; job.n_rows - row >= kTileRows; row += kTileRows) attend<type, kTileRows>(job, row, scratch);
    for (; job.n_rows - row >= 4; row += 4) attend<type, 4>(job, row, scratch);
    for (; job.n_rows - row >= 2; row += 2) attend<type, 2>(job, row, scratch);
    for (; job.n_rows - row >= 1; row += 1) attend<type, 1>(job, row, scratch);
}

void attention(const AttentionJob& job, std::byte* scratch) {
    switch (job.type) {
        case KvType::F32:
            return attend_all<KvType::F32>(job, scratch);
        case KvType::F16:
            return attend_all<KvType::F16>(job, scratch);
        case KvType::BF16:
            return attend_all<KvType::BF16>(job, scratch);
        case KvType::Q8_0:
            return attend_all<KvType::Q8_0>(job, scratch);
    }
}

// 32 numbers, rounded; of Q8_0 the scale is returned.
template <KvType type>
float encode(const float* x, std::byte* to) {
    if constexpr (type == KvType::F32) std::memcpy(to, x, 32 * sizeof(float));
    if constexpr (type == KvType::F16)
        for (int i = 0; i < 32; i += kLanes) store_half(to + 2 * i, load(x + i));
    if constexpr (type == KvType::BF16)
        for (int i = 0; i < 32; ++i) {
            const uint16_t bits = float_to_bfloat16(x[i]);
            std::memcpy(to + 2 * i, &bits, 2);
        }
    if constexpr (type == KvType::Q8_0) return round_to_int8(x, reinterpret_cast<int8_t*>(to));
    return 1;
}

template <KvType type>
void store_both(const KvHeadLayout& layout, int head_dim, const float* key, const float* value, int slot,
                std::byte* part) {
    constexpr int kBytes = kElementBytes<type>;
    for (int i = 0; i < head_dim; i += 32) {
        const int n = head_dim - i < 32 ? head_dim - i : 32;
        alignas(64) float x[32] = {};
        alignas(64) std::byte block[32 * kBytes];
        std::memcpy(x, key + i, n * sizeof(float));
        const float key_scale = encode<type>(x, block);
        for (int k = 0; k < n; ++k)
            std::memcpy(part + layout.keys + ((i + k) * kPageTokens + slot) * kBytes, block + k * kBytes, kBytes);
        std::memcpy(x, value + i, n * sizeof(float));
        const float value_scale = encode<type>(x, block);
        std::memcpy(part + layout.values + (slot * head_dim + i) * kBytes, block, n * kBytes);
        if constexpr (type == KvType::Q8_0) {
            std::memcpy(part + layout.key_scales + (i / 32 * kPageTokens + slot) * sizeof(float), &key_scale,
                        sizeof(float));
            std::memcpy(part + layout.value_scales + (slot * (head_dim / 32) + i / 32) * sizeof(float), &value_scale,
                        sizeof(float));
        }
    }
}

void store_kv(KvType type, const KvHeadLayout& layout, int head_dim, const float* key, const float* value, int slot,
              std::byte* part) {
    switch (type) {
        case KvType::F32:
            return store_both<KvType::F32>(layout, head_dim, key, value, slot, part);
        case KvType::F16:
            return store_both<KvType::F16>(layout, head_dim, key, value, slot, part);
        case KvType::BF16:
            return store_both<KvType::BF16>(layout, head_dim, key, value, slot, part);
        case KvType::Q8_0:
            return store_both<KvType::Q8_0>(layout, head_dim, key, value, slot, part);
    }
}

void fill_attention(Kernels& k) {
    k.store_kv = store_kv;
    k.attention = attention;
}

}  // namespace
}  // namespace gemmart::cpu
