// Attention of MANY rows on tensor cores: a block has kRows rows of a segment that share a kv head, and goes through
// the pages that they see, softmax(q · kᵀ) · v with a running maximum (flash attention).
//
// For a page: scores = q · keys, each wave 16 rows and half of the components (so that it can hold its part of the
// queries in registers); scores to shared memory, where the two halves are added, capped, masked and weighed; then
// out += weights · values, each wave 16 rows and half of the components again.
//
// Queries and weights are two terms of the pages' type: of f16, 22 significant bits, scaled by powers of 2 away from
// denormal numbers; of bf16, 16. F32 and Q8_0 pages are converted to two bf16 terms: three products instead of two.
// Errors against float64, of the largest value, where scores spread by 3: F16 2e-6, others 2e-5 (few rows: 5e-7; by the
// emulator). A soft cap adds up to 2^-21 · cap to a score.
//
// A row's chain of operations depends on its position alone: pages in order, and what it does not see has weight 0.
// (A NaN among values can reach earlier rows of the same block, of its own sequence.)
#include "cuda/attention_tiles.cuh"

namespace gemmart::gpu {
namespace {

constexpr float kWeightScale = 2048;        // keeps low terms of f16 weights normal
constexpr int kQueryExponent = 10;          // of a row's largest component, scaled
constexpr size_t kLeastShared = 64 * 1024;  // bytes of a block, that every device has

// Where there are no tensor cores a product of tiles is hundreds of instructions: such code is not unrolled further.
template <typename T>
constexpr bool kTilesArePointers = requires(TileA<T> a) { a.shared; };

template <typename Pages_, int kHead_, int kWavesM_>
struct Shape {
    using Pages = Pages_;
    using Element = typename Pages::Element;
    static constexpr int kHead = kHead_;      // head_dim at most
    static constexpr int kWavesM = kWavesM_;  // along rows; 2 along components
    static constexpr int kRows = kWavesM * kTileM;
    static constexpr int kThreads = kWavesM * 2 * kTileLanes;
    static constexpr int kLanesARow = kThreads / kRows;          // of softmax
    static constexpr int kPositions = kPageTokens / kLanesARow;  // of a lane
    static constexpr int kSteps = kHead / 2 / kTileK;            // of a wave's half of q · k
    static constexpr int kScoreTiles = kPageTokens / kTileN;
    static constexpr int kOutTiles = kHead / 2 / kTileN;
    static constexpr int kUnrolled = kTilesArePointers<Element> ? 1 : kSteps;

    static constexpr int kQueryLd = kHead + 8, kScoreLd = 2 * kPageTokens + 4, kWeightLd = kPageTokens + 8;
    static constexpr int kPlane = kHead * kPageLd;  // elements of keys, and of values
    // Shared memory, in bytes.
    static constexpr int kQueries = 0;  // [2 terms][kRows][kQueryLd]
    static constexpr int kKeys = kQueries + 2 * kRows * kQueryLd * 2;
    static constexpr int kValues = kKeys + kPlane * 2;                     // or low terms
    static constexpr int kScores = kValues + kPlane * 2;                   // float [kRows][2 halves][32]
    static constexpr int kWeights = kScores + kRows * kScoreLd * 4;        // [2 terms][kRows][kWeightLd]
    static constexpr int kFactors = kWeights + 2 * kRows * kWeightLd * 2;  // float [kRows]
    static constexpr int kBytes = kFactors + kRows * 4;
};

// The segment, and the block of rows in it, that the block'th block has; n_tokens 0: none.
struct RowsOfBlock {
    int segment, first_row, n_tokens, first;  // first: row of the segment's n_tokens · n_group_heads
};
__device__ RowsOfBlock find_rows(const Places& places, int n_group_heads, int rows, int block) {
    for (int segment = places.n_few_segments; segment < places.n_segments; segment++) {
        const int first_row = places.first_row[segment], n_tokens = places.first_row[segment + 1] - first_row;
        const int n_blocks = (n_tokens * n_group_heads + rows - 1) / rows;
        if (block < n_blocks) return {segment, first_row, n_tokens, block * rows};
        block -= n_blocks;
    }
    return {};
}

// Multiplies pairs of terms, but not low with low.
template <typename S>
__device__ __forceinline__ void multiply_terms(TileC& sum, const TileA<typename S::Element>& high,
                                               const TileA<typename S::Element>& low,
                                               const typename S::Element* right) {
    TileB<typename S::Element> b;
    load_b_transposed(b, right, kPageLd);
    multiply(sum, high, b);
    multiply(sum, low, b);
    if constexpr (S::Pages::kTerms == 2) {
        load_b_transposed(b, right + S::kPlane, kPageLd);
        multiply(sum, high, b);
    }
}

// A row of queries in two terms, its lanes together, times a power of 2 whose inverse is returned.
template <typename S>
__device__ float put_query(const float* query, int head_dim, int part, typename S::Element* high) {
    typename S::Element* low = high + S::kRows * S::kQueryLd;
    unsigned largest = 0;  // of magnitudes, by their bits
    if (query)
        for (int i = part; i < head_dim; i += S::kLanesARow)
            largest = max(largest, __float_as_uint(query[i]) & 0x7fffffff);
#pragma unroll
    for (int mask = S::kLanesARow / 2; mask > 0; mask /= 2) largest = max(largest, shuffle_xor(largest, mask));
    const int exponent = min(max(static_cast<int>(largest >> 23) - 127 - kQueryExponent, -120), 120);
    const float factor = __uint_as_float(static_cast<unsigned>(127 - exponent) << 23);
    for (int i = part * 2; i < S::kHead; i += S::kLanesARow * 2) {
        const bool is_there = query && i < head_dim;
        const float a = is_there ? query[i] * factor : 0, b = is_there ? query[i + 1] * factor : 0;
        const uint32_t pair = round_pair<typename S::Element>(a, b);
        const float2 rounded = pair_to_floats<typename S::Element>(pair);
        *reinterpret_cast<uint32_t*>(high + i) = pair;
        *reinterpret_cast<uint32_t*>(low + i) = round_pair<typename S::Element>(a - rounded.x, b - rounded.y);
    }
    return __uint_as_float(static_cast<unsigned>(127 + exponent) << 23);
}

// The softmax of a row as far as it has come, of a lane.
struct Softmax {
    Span seen;
    float unscale;  // of scores
    float largest = -INFINITY, total = 0;
};

// A lane's scores of a page become weights; *factor: what earlier ones are multiplied with.
template <typename S>
__device__ void weigh(Softmax& row, float softcap, int first_position, const float* scores, typename S::Element* high,
                      float* factor) {
    float x[S::kPositions], largest = row.largest;
#pragma unroll
    for (int i = 0; i < S::kPositions; i++) {
        x[i] = (scores[i] + scores[i + kPageTokens]) * row.unscale;
        if (softcap != 0) x[i] = softcap * fast_tanh(x[i] / softcap);
        if (row.seen.holds(first_position + i)) largest = larger(largest, x[i]);
    }
#pragma unroll
    for (int mask = S::kLanesARow / 2; mask > 0; mask /= 2) largest = larger(largest, shuffle_xor(largest, mask));
    // Nothing seen yet, or nothing larger: 1, not the NaN of infinity - infinity.
    const float rescale = largest == row.largest ? 1 : fast_exp(row.largest - largest);
    row.largest = largest;
    row.total *= rescale;
    *factor = rescale;
#pragma unroll
    for (int i = 0; i < S::kPositions; i++) {
        x[i] = row.seen.holds(first_position + i) ? kWeightScale * fast_exp(x[i] - largest) : 0;
        row.total += x[i];
    }
    typename S::Element* low = high + S::kRows * S::kWeightLd;
#pragma unroll
    for (int i = 0; i < S::kPositions; i += 2) {
        const uint32_t pair = round_pair<typename S::Element>(x[i], x[i + 1]);
        const float2 rounded = pair_to_floats<typename S::Element>(pair);
        *reinterpret_cast<uint32_t*>(high + i) = pair;
        *reinterpret_cast<uint32_t*>(low + i) = round_pair<typename S::Element>(x[i] - rounded.x, x[i + 1] - rounded.y);
    }
}

// Blocks: (block of rows, kv head)
template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kHead > 128 ? 1 : 2)
    tile_kernel(Places places, AttentionLayer layer, const float* q, float* out) {
    using Element = typename S::Element;
    using Pages = typename S::Pages;
    SHARED_MEMORY(memory);
    Element* queries = reinterpret_cast<Element*>(memory + S::kQueries);
    Element* keys = reinterpret_cast<Element*>(memory + S::kKeys);
    Element* values = Pages::kCopied ? reinterpret_cast<Element*>(memory + S::kValues) : keys;
    float* scores = reinterpret_cast<float*>(memory + S::kScores);
    Element* weights = reinterpret_cast<Element*>(memory + S::kWeights);
    float* factors = reinterpret_cast<float*>(memory + S::kFactors);
    let_next_start();
    wait_for_previous();

    const int head_dim = layer.head_dim, n_group_heads = layer.n_heads / layer.n_kv_heads, kv_head = blockIdx.y;
    // Those that see most come first.
    const RowsOfBlock rows = find_rows(places, n_group_heads, S::kRows, gridDim.x - 1 - blockIdx.x);
    if (rows.n_tokens == 0) return;  // the whole block
    const int thread = threadIdx.x, wave = thread / kTileLanes;
    const int wave_row = wave / 2 * kTileM, half = wave % 2;

    // The lane's row in softmax.
    const int row = thread / S::kLanesARow, part = thread % S::kLanesARow;
    const auto head_of = [&](int r) {  // of q and out, or -1
        const int i = rows.first + r, token = i / n_group_heads;
        return token < rows.n_tokens
                   ? (rows.first_row + token) * layer.n_heads + kv_head * n_group_heads + i % n_group_heads
                   : -1;
    };
    Softmax softmax;
    softmax.seen = {0, 0};
    const int head = head_of(row);
    if (head >= 0) softmax.seen = seen_from(places.positions[head / layer.n_heads], layer.window);
    softmax.unscale = put_query<S>(head < 0 ? nullptr : q + static_cast<size_t>(head) * head_dim, head_dim, part,
                                   queries + row * S::kQueryLd);
    // Keys of components that there are not: 0, as the queries are there.
    for (int i = head_dim * kPageLd + thread; i < S::kPlane; i += S::kThreads) {
        keys[i] = round_to<Element>(0);
        if constexpr (Pages::kTerms == 2) keys[S::kPlane + i] = round_to<Element>(0);
    }
    __syncthreads();
    TileA<Element> query[2][S::kSteps];
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int s = 0; s < S::kSteps; s++)
            load_a(query[t][s], queries + (t * S::kRows + wave_row) * S::kQueryLd + (half * S::kSteps + s) * kTileK,
                   S::kQueryLd);

    const int last = min((rows.first + S::kRows - 1) / n_group_heads, rows.n_tokens - 1);
    const int begin = seen_from(places.positions[rows.first_row + rows.first / n_group_heads], layer.window).begin;
    const int end = places.positions[rows.first_row + last] + 1;
    const int first_page = begin / kPageTokens, end_page = (end - 1) / kPageTokens + 1;
    const auto part_of = [&](int page) { return page_part(places, layer, rows.segment, page, kv_head); };
    const auto copy_keys = [&](int page) {
        if (page >= end_page) return;
        if constexpr (Pages::kCopied)
            Pages::copy_keys(layer.kv, part_of(page), head_dim, thread, S::kThreads, keys);
        else
            Pages::copy_keys(layer.kv, part_of(page), head_dim, S::kPlane, thread, S::kThreads, keys);
    };
    const auto copy_values = [&](int page) {
        const int n_slots = min(end - page * kPageTokens, kPageTokens);
        if constexpr (Pages::kCopied)
            Pages::copy_values(layer.kv, part_of(page), head_dim, n_slots, thread, S::kThreads, values);
        else
            Pages::copy_values(layer.kv, part_of(page), head_dim, n_slots, S::kPlane, thread, S::kThreads, values);
    };

    TileC sums[S::kOutTiles];
#pragma unroll
    for (int n = 0; n < S::kOutTiles; n++)
#pragma unroll
        for (int e = 0; e < kTileElements; e++) sums[n].x[e] = 0;

    if constexpr (Pages::kCopied) copy_keys(first_page), commit_copies();
    for (int page = first_page; page < end_page; page++) {
        if constexpr (Pages::kCopied) {
            wait_copies<0>();
            __syncthreads();  // the keys are there, the values' room is free
            copy_values(page), commit_copies();
        } else {
            __syncthreads();
            copy_keys(page);
            __syncthreads();
        }

#pragma unroll S::kUnrolled
        for (int n = 0; n < S::kScoreTiles; n++) {
            TileC score{};
#pragma unroll S::kUnrolled
            for (int s = 0; s < S::kSteps; s++)
                if ((half * S::kSteps + s) * kTileK < head_dim)
                    multiply_terms<S>(score, query[0][s], query[1][s],
                                      keys + (half * S::kSteps + s) * kTileK * kPageLd + n * kTileN);
#pragma unroll
            for (int e = 0; e < kTileElements; e++)
                scores[(wave_row + tile_row(e)) * S::kScoreLd + half * kPageTokens + n * kTileN + tile_col(e)] =
                    score.x[e];
        }
        __syncthreads();  // scores are there, the keys' room is free

        if constexpr (Pages::kCopied)
            copy_keys(page + 1), commit_copies();
        else
            copy_values(page);
        weigh<S>(softmax, layer.softcap, page * kPageTokens + part * S::kPositions,
                 scores + row * S::kScoreLd + part * S::kPositions, weights + row * S::kWeightLd + part * S::kPositions,
                 factors + row);
        if constexpr (Pages::kCopied) wait_copies<1>();
        __syncthreads();  // weights and values are there

        float factor[kTileElements];
        bool changed = false;
#pragma unroll
        for (int e = 0; e < kTileElements; e++) {
            factor[e] = factors[wave_row + tile_row(e)];
            changed = changed || factor[e] != 1;
        }
        if (changed)
#pragma unroll
            for (int n = 0; n < S::kOutTiles; n++)
#pragma unroll
                for (int e = 0; e < kTileElements; e++) sums[n].x[e] *= factor[e];
#pragma unroll S::kUnrolled
        for (int s = 0; s < kPageTokens / kTileK; s++) {
            TileA<Element> weight[2];
#pragma unroll
            for (int t = 0; t < 2; t++)
                load_a(weight[t], weights + (t * S::kRows + wave_row) * S::kWeightLd + s * kTileK, S::kWeightLd);
#pragma unroll
            for (int n = 0; n < S::kOutTiles; n++) {
                const int i = half * S::kHead / 2 + n * kTileN;
                if (i < head_dim)
                    multiply_terms<S>(sums[n], weight[0], weight[1],
                                      values + (i / 32 * kPageTokens + s * kTileK) * kPageLd + i % 32);
            }
        }
    }

#pragma unroll
    for (int mask = S::kLanesARow / 2; mask > 0; mask /= 2) softmax.total += shuffle_xor(softmax.total, mask);
    __syncthreads();  // factors have been read
    factors[row] = 1 / softmax.total;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kTileElements; e++) {
        const int r = wave_row + tile_row(e), to = head_of(r);
        if (to < 0) continue;
#pragma unroll
        for (int n = 0; n < S::kOutTiles; n++) {
            const int i = half * S::kHead / 2 + n * kTileN + tile_col(e);
            if (i < head_dim) out[static_cast<size_t>(to) * head_dim + i] = sums[n].x[e] * factors[r];
        }
    }
}

size_t shared_limit() {
    int device;
    check_device(cudaGetDevice(&device), "device");
    return shared_memory_limit(device);
}

template <typename S>
void start_shape(const Places& places, const AttentionLayer& layer, const float* q, float* out, cudaStream_t stream) {
    const int n_rows = (places.n - places.n_few) * (layer.n_heads / layer.n_kv_heads);
    const int n_blocks = n_rows / S::kRows + places.n_segments - places.n_few_segments;  // at most
    launch(tile_kernel<S>, dim3(n_blocks, layer.n_kv_heads), dim3(S::kThreads), S::kBytes, stream, places, layer, q,
           out);
}

// As many rows as the device's shared memory has room for. AMD's is what is least.
template <typename Pages, int kHead, int kWavesM>
void start_head(const Places& places, const AttentionLayer& layer, const float* q, float* out, cudaStream_t stream) {
    using S = Shape<Pages, kHead, kWavesM>;
    constexpr bool kAlwaysFits = S::kBytes <= kLeastShared;
    if constexpr (kAlwaysFits || !GEMMART_HIP)
        if (kAlwaysFits || S::kBytes <= shared_limit()) return start_shape<S>(places, layer, q, out, stream);
    if constexpr (!kAlwaysFits) start_head<Pages, kHead, kWavesM / 2>(places, layer, q, out, stream);
}

template <typename Pages>
void start(const Places& places, const AttentionLayer& layer, const float* q, float* out, cudaStream_t stream) {
    if (layer.head_dim <= 64)
        start_head<Pages, 64, 4>(places, layer, q, out, stream);
    else if (layer.head_dim <= 128)
        start_head<Pages, 128, 4>(places, layer, q, out, stream);
    else
        start_head<Pages, 256, 4>(places, layer, q, out, stream);
}

}  // namespace

void attend_many(const Places& places, const AttentionLayer& layer, const float* q, float* out, cudaStream_t stream) {
    switch (layer.kv.type) {
        case KvType::F32:
        case KvType::Q8_0:
            return start<ConvertedPages>(places, layer, q, out, stream);
        case KvType::F16:
            return start<CopiedPages<__half>>(places, layer, q, out, stream);
        case KvType::BF16:
            return start<CopiedPages<__nv_bfloat16>>(places, layer, q, out, stream);
    }
}

}  // namespace gemmart::gpu
