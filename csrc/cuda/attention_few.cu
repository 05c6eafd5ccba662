// Attention of FEW rows, in float32. A block has one range of 256 positions (of absolute positions, as on the CPU) of
// one kv head, and up to kRows rows of a segment, which share each load. A second kernel adds the ranges in order.
//
// Both matrices of a page have 32 rows' worth of neighbours that a load of 16 bytes takes: of a key, some positions of
// one component; of a value, some components of one position. So both products are the same: lanes sum their loads
// times a weight (a query's component, a position's softmax), and lanes that have the same neighbours add their sums
// at the end, in a tree that leaves one neighbour to each lane. Wave w has the keys of page w, then a block of 32
// components of all pages' values, or where there are fewer blocks a share of the pages.
//
// A row's chain of operations depends on its position alone: what others see and it does not is left out of its sums,
// not added with weight 0, so a NaN stays where it is seen.
#include "cuda/attention.cuh"

namespace gemmart::gpu {
namespace {

constexpr int kPages = kRange / kPageTokens;
constexpr int kThreads = kPages * kLanes;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxRows = 8;  // of a block
// That are on their way at once, as the registers allow.
template <int kRows>
constexpr int kLoads = kRows == kMaxRows ? 2 : 4;

// A range's part of a row: Σ weight · value, then m and Σ weight, where a weight is e^(score - m).
__host__ __device__ constexpr int partial_size(int head_dim) { return (head_dim + 31) / 32 * 32 + 4; }

// kN neighbours, as floats.
template <typename T>
struct Neighbours {
    static constexpr int kN = sizeof(T) == 4 ? 4 : 8;
    static constexpr int kLanesARow = 32 / kN;              // that have the 32 neighbours of a row
    static constexpr int kRowsAStep = kLanes / kLanesARow;  // that the lanes read at once

    static __device__ __forceinline__ void load(const T* from, float (&x)[kN]) {
        if constexpr (sizeof(T) == 4) {
            const float4 all = *reinterpret_cast<const float4*>(from);
            x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
        } else if constexpr (sizeof(T) == 2) {
            const uint4 all = *reinterpret_cast<const uint4*>(from);
            const uint32_t words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 pair = pair_to_floats<T>(words[i]);
                x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
            }
        } else {
            const uint2 all = *reinterpret_cast<const uint2*>(from);
#pragma unroll
            for (int i = 0; i < 8; i++)
                x[i] = static_cast<float>(static_cast<int8_t>((i < 4 ? all.x : all.y) >> i % 4 * 8));
        }
    }
};

// Adds up x over the lanes that have the same neighbours; each lane gets the sum of one, neighbour_of_lane().
template <int kN>
__device__ __forceinline__ float scatter_sum(float (&x)[kN]) {
#pragma unroll
    for (int half = kN / 2, mask = kLanes / 2; half > 0; half /= 2, mask /= 2) {
        const bool upper = lane() & mask;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float kept = upper ? x[i + half] : x[i], given = upper ? x[i] : x[i + half];
            x[i] = kept + shuffle_xor(given, mask);
        }
    }
    return x[0];
}
template <int kN>
__device__ __forceinline__ int neighbour_of_lane() {
    int i = lane() % (32 / kN) * kN;
#pragma unroll
    for (int half = kN / 2, mask = kLanes / 2; half > 0; half /= 2, mask /= 2) i += lane() & mask ? half : 0;
    return i;
}

// Keys of floating-point types: queries stand in shared memory as [head_dim][kRows].
template <typename T, int kRows>
struct Scores {
    using Near = Neighbours<T>;

    static __device__ void put_query(int r, const float* query, int head_dim, float* room) {
        for (int i = lane(); i < head_dim; i += kLanes) room[i * kRows + r] = query ? query[i] : 0;
    }

    // Of the position neighbour_of_lane<kN>() of a page.
    static constexpr int kN = Near::kN;
    static __device__ void compute(const KvHeadLayout& layout, const std::byte* part, int head_dim, const float* room,
                                   float (&scores)[kRows]) {
        const T* keys = reinterpret_cast<const T*>(part + layout.keys) + lane() % Near::kLanesARow * kN;
        float sums[kRows][kN] = {};
#pragma unroll kLoads < kRows>
        for (int i = lane() / Near::kLanesARow; i < head_dim; i += Near::kRowsAStep) {
            float x[kN];
            Near::load(keys + i * kPageTokens, x);
#pragma unroll
            for (int r = 0; r < kRows; r++)
#pragma unroll
                for (int j = 0; j < kN; j++) sums[r][j] = fmaf(room[i * kRows + r], x[j], sums[r][j]);
        }
#pragma unroll
        for (int r = 0; r < kRows; r++) scores[r] = scatter_sum(sums[r]);
    }
};

// Keys of 8 bits: a word has 4 components of a position. Queries become d · (256 high + low), by at most 1/65024 of
// the largest of 32 components beside the truth, so that the sums of 32 are exact: words [head_dim / 4][kRows] of high
// and of low bytes, then d [head_dim / 32][kRows].
template <int kRows>
struct Scores<int8_t, kRows> {
    static constexpr int kN = 4;
    static constexpr int kLanesARow = 8;

    static __device__ void put_query(int r, const float* query, int head_dim, float* room) {
        int8_t* high = reinterpret_cast<int8_t*>(room);
        int8_t* low = high + head_dim * kRows;
        float* d = reinterpret_cast<float*>(low + head_dim * kRows);
        for (int block = 0; block < head_dim; block += kLanes) {
            const int i = block + lane();
            const float x = query ? query[i] : 0;
            const float largest = __uint_as_float(max_lanes(__float_as_uint(x) & 0x7fffffff));
            const float scale = largest / (127 * 256);
            const unsigned exponent = __float_as_uint(scale) >> 23;
            const bool is_normal = exponent != 0 && exponent != 255;
            const int rounded = is_normal ? __float2int_rn(x * (127 * 256 / largest)) : 0;
            const int upper = (rounded + 128) >> 8, at = (i / 4 * kRows + r) * 4 + i % 4;
            high[at] = static_cast<int8_t>(upper);
            low[at] = static_cast<int8_t>(rounded - 256 * upper);
            if (lane() == 0) d[block / 32 * kRows + r] = scale;
        }
    }

    static __device__ void compute(const KvHeadLayout& layout, const std::byte* part, int head_dim, const float* room,
                                   float (&scores)[kRows]) {
        const int first = lane() % kLanesARow * kN;
        const int* high = reinterpret_cast<const int*>(room);
        const int* low = high + head_dim / 4 * kRows;
        const float* d = reinterpret_cast<const float*>(low + head_dim / 4 * kRows);
        const int8_t* keys = reinterpret_cast<const int8_t*>(part + layout.keys);
        const float* scales = reinterpret_cast<const float*>(part + layout.key_scales) + first;
        float sums[kRows][kN] = {};
        for (int block = 0; block < head_dim / 32; block++) {
            const float4 scale = *reinterpret_cast<const float4*>(scales + block * kPageTokens);
            int high_sums[kRows][kN] = {}, low_sums[kRows][kN] = {};
#pragma unroll
            for (int step = 0; step < 2; step++) {
                const int i = block * 8 + step * 4 + lane() / kLanesARow;
                const int4 words = *reinterpret_cast<const int4*>(keys + (i * kPageTokens + first) * 4);
                const int x[kN] = {words.x, words.y, words.z, words.w};
#pragma unroll
                for (int r = 0; r < kRows; r++)
#pragma unroll
                    for (int j = 0; j < kN; j++) {
                        high_sums[r][j] = dot4(high[i * kRows + r], x[j], high_sums[r][j]);
                        low_sums[r][j] = dot4(low[i * kRows + r], x[j], low_sums[r][j]);
                    }
            }
            const float of_key[kN] = {scale.x, scale.y, scale.z, scale.w};
#pragma unroll
            for (int r = 0; r < kRows; r++) {
                const float of_query = d[block * kRows + r];
#pragma unroll
                for (int j = 0; j < kN; j++) {
                    const float product = static_cast<float>(256 * high_sums[r][j] + low_sums[r][j]);
                    sums[r][j] = fmaf(product, of_key[j] * of_query, sums[r][j]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; r++) scores[r] = scatter_sum(sums[r]);
    }
};

// sums += weights · values of one block of 32 components of a page.
template <typename T, int kRows, bool kWhole>
__device__ __forceinline__ void add_values(const KvHeadLayout& layout, const std::byte* part, int block,
                                           const float* weights, const Span (&seen)[kRows], int page,
                                           float (&sums)[kRows][Neighbours<T>::kN]) {
    using Near = Neighbours<T>;
    const T* values = reinterpret_cast<const T*>(part + layout.values) + block * 32 * kPageTokens +
                      lane() % Near::kLanesARow * Near::kN;
#pragma unroll kLoads < kRows>
    for (int slot = lane() / Near::kLanesARow; slot < kPageTokens; slot += Near::kRowsAStep) {
        float x[Near::kN], scale = 1;
        Near::load(values + slot * 32, x);
        if constexpr (sizeof(T) == 1)
            scale = reinterpret_cast<const float*>(part + layout.value_scales)[block * kPageTokens + slot];
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            if (!kWhole && !seen[r].holds(page * kPageTokens + slot)) continue;
            const float weight = weights[slot * kRows + r] * scale;
#pragma unroll
            for (int j = 0; j < Near::kN; j++) sums[r][j] = fmaf(weight, x[j], sums[r][j]);
        }
    }
}

// partials [n_few, n_heads, n_ranges, partial_size]; blocks: (range, kv head × n_chunks of kRows rows, segment)
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == kMaxRows ? 2 : 3)
    range_kernel(Places places, AttentionLayer layer, const float* q, float* partials, int n_chunks) {
    __shared__ float room[kMaxHeadDim * kRows];  // queries, then sums of values
    __shared__ float weights[kRange * kRows];
    __shared__ float page_max[kPages][kRows], page_sum[kPages][kRows];
    let_next_start();
    wait_for_previous();

    const int range = blockIdx.x, kv_head = blockIdx.y / n_chunks, chunk = blockIdx.y % n_chunks;
    const int segment = blockIdx.z, n_ranges = gridDim.x;
    const int first_row = places.first_row[segment], n_tokens = places.first_row[segment + 1] - first_row;
    const int head_dim = layer.head_dim, n_group_heads = layer.n_heads / layer.n_kv_heads;
    const int first_page = range * kPages;

    Span seen[kRows];     // of this range
    int heads_at[kRows];  // row · n_heads + head
    bool any = false;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
        const int i = chunk * kRows + r, token = i / n_group_heads;
        seen[r] = {0, 0}, heads_at[r] = 0;
        if (token >= n_tokens) continue;
        heads_at[r] = (first_row + token) * layer.n_heads + kv_head * n_group_heads + i % n_group_heads;
        const Span all = seen_from(places.positions[first_row + token], layer.window);
        seen[r] = {max(all.begin, range * kRange), min(all.end, (range + 1) * kRange)};
        if (seen[r].begin >= seen[r].end) seen[r] = {0, 0};
        any = any || seen[r].end > 0;
    }
    if (!any) return;  // the whole block

    for (int r = group(); r < kRows; r += kPages) {
        const float* query = nullptr;  // chosen without an index that is not known: it would put arrays into memory
#pragma unroll
        for (int i = 0; i < kRows; i++)
            if (i == r && seen[i].end > 0) query = q + static_cast<size_t>(heads_at[i]) * head_dim;
        Scores<T, kRows>::put_query(r, query, head_dim, room);
    }
    __syncthreads();

    const auto touched = [&](int page) {
        bool is = false;
#pragma unroll
        for (int r = 0; r < kRows; r++) is = is || seen[r].touches(page);
        return is;
    };
    float scores[kRows] = {};
    const int page = first_page + group();
    const int position = page * kPageTokens + neighbour_of_lane<Scores<T, kRows>::kN>();
    if (touched(page))
        Scores<T, kRows>::compute(layer.kv.layout, page_part(places, layer, segment, page, kv_head), head_dim, room,
                                  scores);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
        if (layer.softcap != 0) scores[r] = layer.softcap * tanhf(scores[r] / layer.softcap);
        const float largest = max_lanes(seen[r].holds(position) ? scores[r] : -INFINITY);
        if (lane() == 0) page_max[group()][r] = largest;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; r++) {
        float largest = page_max[0][r];
#pragma unroll
        for (int i = 1; i < kPages; i++) largest = larger(largest, page_max[i][r]);
        const float weight = seen[r].holds(position) ? expf(scores[r] - largest) : 0;
        weights[(position - range * kRange) * kRows + r] = weight;
        const float sum = sum_lanes(weight);
        if (lane() == 0) page_sum[group()][r] = sum;
    }
    __syncthreads();

    const int n_blocks = (head_dim + 31) / 32, n_shares = kPages / n_blocks;
    const int block = group() % n_blocks, share = group() / n_blocks;
    constexpr int kN = Neighbours<T>::kN;
    float sums[kRows][kN] = {};
    if (share < n_shares)
        for (int i = share; i < kPages; i += n_shares) {
            const int number = first_page + i;
            if (!touched(number)) continue;
            bool whole = true;
#pragma unroll
            for (int r = 0; r < kRows; r++) whole = whole && (seen[r].end == 0 || seen[r].covers(number));
            const std::byte* part = page_part(places, layer, segment, number, kv_head);
            const float* of_page = weights + i * kPageTokens * kRows;
            if (whole)
                add_values<T, kRows, true>(layer.kv.layout, part, block, of_page, seen, number, sums);
            else
                add_values<T, kRows, false>(layer.kv.layout, part, block, of_page, seen, number, sums);
        }
#pragma unroll
    for (int r = 0; r < kRows; r++)
        room[(group() * kLanes + neighbour_of_lane<kN>()) * kRows + r] = scatter_sum(sums[r]);
    __syncthreads();

    const int i = threadIdx.x, size = partial_size(head_dim);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
        if (seen[r].end == 0) continue;
        float* to = partials + (static_cast<size_t>(heads_at[r]) * n_ranges + range) * size;
        if (i < head_dim) {
            float sum = room[i * kRows + r];
            for (int s = 1; s < n_shares; s++) sum += room[(s * n_blocks * 32 + i) * kRows + r];
            to[i] = sum;
        }
        if (i == 0) {
            float largest = page_max[0][r], total = page_sum[0][r];
            for (int p = 1; p < kPages; p++) largest = larger(largest, page_max[p][r]), total += page_sum[p][r];
            to[size - 4] = largest, to[size - 3] = total;
        }
    }
}

// Adds the ranges that a row sees, in order, relative to the largest of their m. Blocks: (head, row)
__global__ void __launch_bounds__(kMaxHeadDim)
    merge_kernel(Places places, AttentionLayer layer, const float* partials, int n_ranges, float* out) {
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.y, i = threadIdx.x, size = partial_size(layer.head_dim);
    const size_t head = static_cast<size_t>(row) * layer.n_heads + blockIdx.x;
    const float* from = partials + head * n_ranges * size;
    const Span seen = seen_from(places.positions[row], layer.window);
    const int begin = seen.begin / kRange, end = (seen.end - 1) / kRange + 1;
    float largest = from[begin * size + size - 4];
    for (int r = begin + 1; r < end; r++) largest = larger(largest, from[r * size + size - 4]);
    float sum = 0, total = 0;
    for (int r = begin; r < end; r++) {
        const float weight = expf(from[r * size + size - 4] - largest);
        sum = fmaf(weight, from[r * size + i], sum);
        total = fmaf(weight, from[r * size + size - 3], total);
    }
    if (i < layer.head_dim) out[head * layer.head_dim + i] = sum / total;
}

template <typename T>
void start(const Places& places, const AttentionLayer& layer, const float* q, float* partials, int n_ranges,
           cudaStream_t stream) {
    const int n_tokens = std::min(kFewTokens, places.n_few - places.n_few_segments + 1);  // the most of a segment
    const int n_rows = n_tokens * (layer.n_heads / layer.n_kv_heads);
    const auto start_rows = [&](auto kernel, int n) {
        const int n_chunks = (n_rows + n - 1) / n;
        const dim3 grid(n_ranges, layer.n_kv_heads * n_chunks, places.n_few_segments);
        launch(kernel, grid, dim3(kThreads), 0, stream, places, layer, q, partials, n_chunks);
    };
    if (n_rows == 1)
        start_rows(range_kernel<T, 1>, 1);
    else if (n_rows == 2)
        start_rows(range_kernel<T, 2>, 2);
    else if (n_rows <= 4)
        start_rows(range_kernel<T, 4>, 4);
    else
        start_rows(range_kernel<T, kMaxRows>, kMaxRows);
}

}  // namespace

size_t attention_scratch_bytes(int n_few, int n_heads, int head_dim, int n_positions) {
    const size_t n_ranges = (n_positions + kRange - 1) / kRange;
    return n_few * n_heads * n_ranges * partial_size(head_dim) * sizeof(float);
}

void attend_few(const Places& places, const AttentionLayer& layer, const float* q, float* out, std::byte* scratch,
                cudaStream_t stream) {
    float* partials = reinterpret_cast<float*>(scratch);
    const int n_ranges = places.last_position / kRange + 1;
    switch (layer.kv.type) {
        case KvType::F32:
            start<float>(places, layer, q, partials, n_ranges, stream);
            break;
        case KvType::F16:
            start<__half>(places, layer, q, partials, n_ranges, stream);
            break;
        case KvType::BF16:
            start<__nv_bfloat16>(places, layer, q, partials, n_ranges, stream);
            break;
        case KvType::Q8_0:
            start<int8_t>(places, layer, q, partials, n_ranges, stream);
            break;
    }
    const int n_threads = (layer.head_dim + 31) / 32 * 32;
    launch(merge_kernel, dim3(layer.n_heads, places.n_few), dim3(n_threads), 0, stream, places, layer, partials,
           n_ranges, out);
}

}  // namespace gemmart::gpu
