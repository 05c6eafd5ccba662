// Storing keys and values, and attention over pages, on the vectors of simd_<isa>.h.
//
// Both products, scores = queries · keys and sums = weights · values, are one small kernel, multiply(): rows × two
// vectors of columns stay in registers, each number of the left side is broadcast. Keys stand transposed, so that a
// column is a position; of the values a column is a component. Many rows share keys and values unpacked to float32 (a
// panel, in L1); few rows unpack them in registers, so that decoding reads the cache once and writes nothing. Each
// output is one chain of operations in order of position, so tiles do not show in the results.
//
// Slots that a row does not see may hold anything, NaN too. Their scores are replaced, and multiply() runs over the
// slots that all rows of the tile see, then over what single rows see besides.
//
// Measured on a two-core Xeon guest (220 GFLOP/s of FMA a core, reads of 32 GB/s), 8,192 positions, head_dim 256, 2
// rows a token, cap 50: with AVX-512 64 tokens of prefill at 140-170 GFLOP/s a core (AVX2: 92), of which the softmax
// takes an eighth; decoding on both cores reads F16 at 27-30 GB/s (AVX2: 24), Q8_0 at 25.
#pragma once

#include <cstring>

#include "cpu/convert.h"
#include "cpu/simd_math.h"
#include "cpu/tables.h"

namespace gemmart::cpu {
namespace {

constexpr int kColumns = 2 * kLanes;    // of a tile
constexpr int kPanelColumns = 32;       // a row of keys or values
constexpr int kPanelRows = kRange;      // at most
constexpr int kLdScores = kRange + 16;  // rows of power-of-2 strides would fall into the same sets of the L1 cache
constexpr int kRangePages = kRange / kPageTokens;
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

// Asks for a row of 32 numbers of the matrix that is read next, so that it comes from memory meanwhile.
template <KvType type>
void prefetch_row(const std::byte* matrix, int row) {
    for (int i = 0; i < 32 * kElementBytes<type>; i += 64)
        __builtin_prefetch(matrix + row * 32 * kElementBytes<type> + i, 0, 2);
}

// The right sides of multiply(): kLanes numbers of a row from a column on.

// A page's keys: rows are components, columns positions.
template <KvType type>
struct Keys {
    const std::byte* keys;
    const float* scales;
    const std::byte* next;

    void prefetch(int component) const { prefetch_row<type>(next, component); }

    Vec operator()(int component, int slot) const {
        if constexpr (type == KvType::Q8_0)
            return load_byte_of_4(keys + (component / 4 * kPageTokens + slot) * 4, component % 4) *
                   load(scales + component / 32 * kPageTokens + slot);
        return load_elements<type>(keys, component * kPageTokens + slot);
    }
};

// Some components of a page's values: rows are positions, columns components.
template <KvType type>
struct Values {
    const std::byte* values;  // [kPageTokens][32]
    const float* scales;      // [kPageTokens]
    int first;                // slot of the range
    const std::byte* next;

    void prefetch(int slot) const { prefetch_row<type>(next, slot - first); }
    Vec operator()(int slot, int component) const {
        const Vec value = load_elements<type>(values, (slot - first) * 32 + component);
        if constexpr (type == KvType::Q8_0) return value * splat(scales[slot - first]);
        return value;
    }
};

// Either of them, unpacked: rows from `first` on.
struct Panel {
    const float* numbers;
    int first;

    void prefetch(int) const {}
    Vec operator()(int row, int column) const { return load(numbers + (row - first) * kPanelColumns + column); }
};

template <class Right>
void unpack(const Right& right, int begin, int end, float* to) {
    for (int row = begin; row < end; ++row)
        for (int column = 0; column < kPanelColumns; column += kLanes, to += kLanes) store(to, right(row, column));
}

// sums[r · ld + column] += Σ_k left[r][k] · right(k, column), k in [begin, end) in order.
template <int kRows, class Right>
void multiply(const float* const* left, const Right& right, int begin, int end, float* sums, size_t ld) {
    for (int column = 0; column < kPanelColumns; column += kColumns) {
        Vec sum[kRows][2];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            sum[r][0] = load(sums + r * ld + column);
            sum[r][1] = load(sums + r * ld + column + kLanes);
        }
        for (int k = begin; k < end; ++k) {
            if (column == 0) right.prefetch(k);
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

template <int n>
struct Count {};

// f(first row, Count<number of rows>()) for tiles of all rows.
template <int kLargest = kTileRows, class F>
void each_tile(int n_rows, F f) {
    int row = 0;
    for (; n_rows - row >= kLargest; row += kLargest) f(row, Count<kLargest>());
    for (; n_rows - row >= 4; row += 4) f(row, Count<4>());
    for (; n_rows - row >= 2; row += 2) f(row, Count<2>());
    for (; n_rows - row >= 1; row += 1) f(row, Count<1>());
}

// Slots of a range or page, from its first position on.
struct Slots {
    int begin, end;
    bool empty() const { return begin >= end; }
};
Slots common(Slots a, Slots b) { return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end}; }

// Part of a row's softmax.
struct Softmax {
    float max = 0, total = 0;  // total 0: nothing seen
};

// Scores of a range, before the cap, become weights relative to the largest.
Softmax weigh(Slots seen, float cap, float* scores) {
    const int begin = seen.begin / kLanes * kLanes;
    const auto bits = [&](int i) {
        const Slots lanes = common({seen.begin - i, seen.end - i}, {0, kLanes});
        return (1u << lanes.end) - (1u << lanes.begin);
    };
    Vec largest = splat(-kInfinity);
    for (int i = begin; i < seen.end; i += kLanes) largest = max(largest, keep(load(scores + i), bits(i), -kInfinity));
    Vec reference = splat(largest_of(largest));
    if (cap) reference = capped(reference, cap);
    Vec total = splat(0);
    for (int i = begin; i < seen.end; i += kLanes) {
        const Vec score = load(scores + i);
        const Vec weight = keep(exp((cap ? capped(score, cap) : score) - reference), bits(i), 0);
        total = total + weight;
        store(scores + i, weight);
    }
    float lanes[kLanes];
    store(lanes, total);
    const float sum = tree_sum(lanes, kLanes);
    store(lanes, reference);
    return {lanes[0], sum};
}

// Adds a sum of values, relative to its own maximum, to another one.
void add(Softmax from, const float* values, int n, Softmax& to, float* sums) {
    if (from.total == 0) return;
    if (to.total == 0) {
        to = from;
        for (int i = 0; i < n; i += kLanes) store_n(sums + i, load_n(values + i, n - i), n - i);
        return;
    }
    const float max = from.max > to.max ? from.max : to.max;
    const Vec before = exp(splat(to.max - max)), added = exp(splat(from.max - max));
    for (int i = 0; i < n; i += kLanes)
        store_n(sums + i, fma(load_n(sums + i, n - i), before, load_n(values + i, n - i) * added), n - i);
    float lanes[kLanes];
    store(lanes, fma(splat(to.total), before, splat(from.total) * added));
    to = {max, lanes[0]};
}

// Rows of a job. The arrays in scratch have room for kMaxAttentionRows.
struct Rows {
    int n;
    const float* queries[kMaxAttentionRows];
    Slots sees[kMaxAttentionRows];      // positions
    Slots seen[kMaxAttentionRows];      // those of the present range
    uint32_t pages[kMaxAttentionRows];  // bit i: the row sees something of the range's page i
    Softmax of_range[kMaxAttentionRows], all[kMaxAttentionRows];
    float* scores;                            // [n][kLdScores], then weights
    const float* weights[kMaxAttentionRows];  // the same, by row
    float* sums;                              // [n][ld] of the present range
    size_t ld;
    float* panel;      // [kPanelRows][kPanelColumns]
    std::byte* spare;  // the rest of scratch

    uint32_t pages_of(int row, int n_rows) const {
        uint32_t bits = 0;
        for (int r = row; r < row + n_rows; ++r) bits |= pages[r];
        return bits;
    }
};

// weights · values over the slots of a range that `values` has.
template <class Right>
void add_values(const Rows& rows, const Right& values, Slots slots, float* sums) {
    each_tile(rows.n, [&]<int kRows>(int row, Count<kRows>) {
        const float* const* weights = rows.weights + row;
        float* to = sums + row * rows.ld;
        Slots all = slots;  // what all rows see
        for (int r = 0; r < kRows; ++r) all = common(all, rows.seen[row + r]);
        if (all.empty()) all = {slots.end, slots.end};
        const auto alone = [&](int r, Slots part) {
            part = common(part, rows.seen[row + r]);
            if (!part.empty()) multiply<1>(weights + r, values, part.begin, part.end, to + r * rows.ld, rows.ld);
        };
        for (int r = 0; r < kRows; ++r) alone(r, {slots.begin, all.begin});
        multiply<kRows>(weights, values, all.begin, all.end, to, rows.ld);
        for (int r = 0; r < kRows; ++r) alone(r, {all.end, slots.end});
    });
}

// Both products for one type of keys and values, in float32: scores [rows.n][kLdScores] of the pages of a range, and
// sums [rows.n][ld] of its values. Bit i of `pages`: some row sees something of the range's page i, parts[i].
template <KvType type>
struct FloatProducts {
    static void prepare(const AttentionJob&, Rows&) {}

    template <bool unpacked>
    static void scores(const AttentionJob& job, const Rows& rows, uint32_t pages, const std::byte* const* parts) {
        std::memset(rows.scores, 0, rows.n * kLdScores * sizeof(float));
        for (int i = 0; i < kRangePages; ++i)
            if (pages >> i & 1)
                add_scores<unpacked>(
                    job, rows, i,
                    Keys<type>{parts[i] + job.layout.keys,
                               reinterpret_cast<const float*>(parts[i] + job.layout.key_scales),
                               pages >> (i + 1) & 1 ? parts[i + 1] + job.layout.keys
                                                    : parts[__builtin_ctz(pages)] + job.layout.values});
    }

    template <bool unpacked>
    static void values(const AttentionJob& job, const Rows& rows, uint32_t pages, const std::byte* const* parts) {
        std::memset(rows.sums, 0, rows.n * rows.ld * sizeof(float));
        const int n_blocks = (job.head_dim + kPanelColumns - 1) / kPanelColumns;
        const auto block = [&](int i, int b) {
            const size_t at = job.layout.values + b * kPageTokens * kPanelColumns * kElementBytes<type>;
            return Values<type>{parts[i] + at,
                                reinterpret_cast<const float*>(parts[i] + job.layout.value_scales) + b * kPageTokens,
                                i * kPageTokens, (pages >> (i + 1) & 1 ? parts[i + 1] : parts[i]) + at};
        };
        if constexpr (unpacked) {
            for (int b = 0; b < n_blocks; ++b) {
                for (int i = 0; i < kRangePages; ++i)
                    if (pages >> i & 1)
                        unpack(block(i, b), i * kPageTokens, (i + 1) * kPageTokens,
                               rows.panel + i * kPageTokens * kPanelColumns);
                add_values(rows, Panel{rows.panel, 0}, {0, kRange}, rows.sums + b * kPanelColumns);
            }
        } else {
            for (int i = 0; i < kRangePages; ++i)
                for (int b = 0; b < n_blocks && pages >> i & 1; ++b)
                    add_values(rows, block(i, b), {i * kPageTokens, (i + 1) * kPageTokens},
                               rows.sums + b * kPanelColumns);
        }
    }

  private:
    // Of a range's i-th page.
    template <bool unpacked>
    static void add_scores(const AttentionJob& job, const Rows& rows, int i, const Keys<type>& keys) {
        for (int begin = 0; begin < job.head_dim; begin += kPanelRows) {
            const int end = job.head_dim - begin < kPanelRows ? job.head_dim : begin + kPanelRows;
            if (unpacked) unpack(keys, begin, end, rows.panel);
            each_tile(rows.n, [&]<int kRows>(int row, Count<kRows>) {
                if (!(rows.pages_of(row, kRows) >> i & 1)) return;
                float* scores = rows.scores + row * kLdScores + i * kPageTokens;
                if constexpr (unpacked)
                    multiply<kRows>(rows.queries + row, Panel{rows.panel, begin}, begin, end, scores, kLdScores);
                else
                    multiply<kRows>(rows.queries + row, keys, begin, end, scores, kLdScores);
            });
        }
    }
};

// What Rows leaves of scratch.
constexpr int spare_bytes(int head_dim) {
    return static_cast<int>(kScratchBytes) -
           static_cast<int>(sizeof(float)) *
               (kPanelRows * kPanelColumns + kMaxAttentionRows * (kLdScores + partial_size(head_dim)));
}

template <class Products, bool unpacked>
void attend_range(const AttentionJob& job, int range, Rows& rows) {
    for (int r = 0; r < rows.n; ++r) {
        Slots seen = common({rows.sees[r].begin - range * kRange, rows.sees[r].end - range * kRange}, {0, kRange});
        if (seen.empty()) seen = {0, 0};
        rows.seen[r] = seen;
        const int page_begin = seen.begin / kPageTokens, page_end = (seen.end + kPageTokens - 1) / kPageTokens;
        rows.pages[r] = (1u << page_end) - (1u << page_begin);
    }
    const uint32_t pages = rows.pages_of(0, rows.n);
    if (pages == 0) return;
    const std::byte* const* parts = job.pages + range * kRangePages;
    Products::template scores<unpacked>(job, rows, pages, parts);
    for (int r = 0; r < rows.n; ++r)
        rows.of_range[r] =
            rows.seen[r].empty() ? Softmax{} : weigh(rows.seen[r], job.softcap, rows.scores + r * kLdScores);
    Products::template values<unpacked>(job, rows, pages, parts);
    for (int r = 0; r < rows.n; ++r)
        add(rows.of_range[r], rows.sums + r * rows.ld, partial_size(job.head_dim) - 16, rows.all[r],
            job.partials + r * job.ld_partials);
}

template <class Products>
void attend(const AttentionJob& job, std::byte* scratch) {
    const int n_values = partial_size(job.head_dim) - 16;
    Rows rows;
    rows.n = job.n_rows;
    rows.ld = n_values + 16;
    rows.panel = reinterpret_cast<float*>(scratch);
    rows.scores = rows.panel + kPanelRows * kPanelColumns;
    rows.sums = rows.scores + kMaxAttentionRows * kLdScores;
    rows.spare = reinterpret_cast<std::byte*>(rows.sums + kMaxAttentionRows * rows.ld);
    static_assert(spare_bytes(kMaxHeadDim) > 0);
    for (int r = 0; r < rows.n; ++r) {
        const int last = job.positions[r];
        rows.queries[r] = job.queries[r];
        rows.weights[r] = rows.scores + r * kLdScores;
        rows.sees[r] = {job.window && last >= job.window ? last - job.window + 1 : 0, last + 1};
        rows.all[r] = {};
        std::memset(job.partials + r * job.ld_partials, 0, n_values * sizeof(float));
    }
    Products::prepare(job, rows);
    for (int range = job.range_begin; range < job.range_end; ++range)
        if (rows.n >= kTileRows)
            attend_range<Products, true>(job, range, rows);
        else
            attend_range<Products, false>(job, range, rows);
    for (int r = 0; r < rows.n; ++r) {
        float* end = job.partials + r * job.ld_partials + n_values;
        end[0] = rows.all[r].max, end[1] = rows.all[r].total;
    }
}

template <template <KvType> class Products>
void attention(const AttentionJob& job, std::byte* scratch) {
    switch (job.type) {
        case KvType::F32:
            return attend<Products<KvType::F32>>(job, scratch);
        case KvType::F16:
            return attend<Products<KvType::F16>>(job, scratch);
        case KvType::BF16:
            return attend<Products<KvType::BF16>>(job, scratch);
        case KvType::Q8_0:
            return attend<Products<KvType::Q8_0>>(job, scratch);
    }
}

void merge(const float* partials, int n, int head_dim, float* out) {
    const int size = partial_size(head_dim);
    Softmax all;
    for (int i = 0; i < n; ++i) {
        const float* from = partials + static_cast<size_t>(i) * size;
        add({from[size - 16], from[size - 15]}, from, head_dim, all, out);
    }
    for (int i = 0; i < head_dim; i += kLanes)
        store_n(out + i, load_n(out + i, head_dim - i) / splat(all.total), head_dim - i);
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
        // Q8_0 keeps four components together.
        constexpr int kTogether = type == KvType::Q8_0 ? 4 : 1, kStep = kTogether * kBytes;
        for (int k = 0; k < n; k += kTogether)
            std::memcpy(part + layout.keys + (i + k) * kPageTokens * kBytes + slot * kStep, block + k * kBytes, kStep);
        std::memcpy(x, value + i, n * sizeof(float));
        const float value_scale = encode<type>(x, block);
        std::memcpy(part + layout.values + (i * kPageTokens + slot * 32) * kBytes, block, n * kBytes);
        if constexpr (type == KvType::Q8_0) {
            const size_t at = (i / 32 * kPageTokens + slot) * sizeof(float);
            std::memcpy(part + layout.key_scales + at, &key_scale, sizeof(float));
            std::memcpy(part + layout.value_scales + at, &value_scale, sizeof(float));
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

template <template <KvType> class Products>
void fill_attention(Kernels& k) {
    k.store_kv = store_kv;
    k.attention = attention<Products>;
    k.merge = merge;
}

}  // namespace
}  // namespace gemmart::cpu
