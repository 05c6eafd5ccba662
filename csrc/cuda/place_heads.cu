// Queries, keys and values of a pass on their way to attention: QK norm, rope, the queries' scale, and keys and values
// into pages in the bytes of kv_layout.h. 32 lanes have a head; without a norm each number is the one chain of float
// operations that cpu/attention_scalar.cpp has.
#include "cuda/attention.cuh"

namespace gemmart::gpu {
namespace {

constexpr int kHeads = 4;  // of a block
constexpr int kMaxHeadDim = 256;
constexpr int kPairs = kMaxHeadDim / 2 / kLanes;  // of a lane
constexpr int kAngles = 256;                      // of a block

__global__ void __launch_bounds__(kAngles)
    rope_kernel(Places places, const double* inv_freq, int half, float* cosines, float* sines) {
    let_next_start();
    wait_for_previous();
    const int i = blockIdx.x * kAngles + threadIdx.x;
    if (i >= places.n * half) return;
    const double angle = places.positions[i / half] * inv_freq[i % half];
    cosines[i] = static_cast<float>(cos(angle));
    sines[i] = static_cast<float>(sin(angle));
}

// Norms and rotates a head.
__device__ void place_head(const AttentionLayer& layer, const float* from, const float* norm, int row, float scale,
                           float* to) {
    const int half = layer.head_dim / 2;
    float a[kPairs], b[kPairs], sum = 0;
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
        const int pair = lane() + i * kLanes;
        if (pair >= half) continue;
        a[i] = from[layer.neox ? pair : 2 * pair];
        b[i] = from[layer.neox ? pair + half : 2 * pair + 1];
        sum += a[i] * a[i] + b[i] * b[i];
    }
    const float inverse = norm ? 1 / sqrtf(sum_lanes(sum) / layer.head_dim + layer.eps) : 1;
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
        const int pair = lane() + i * kLanes;
        if (pair >= half) continue;
        const int at_a = layer.neox ? pair : 2 * pair, at_b = layer.neox ? pair + half : 2 * pair + 1;
        if (norm) a[i] = a[i] * inverse * norm[at_a], b[i] = b[i] * inverse * norm[at_b];
        const float cosine = layer.cosines[static_cast<size_t>(row) * half + pair];
        const float sine = layer.sines[static_cast<size_t>(row) * half + pair];
        to[at_a] = (a[i] * cosine - b[i] * sine) * scale;
        to[at_b] = (a[i] * sine + b[i] * cosine) * scale;
    }
}

// Of component i of a key or value among the numbers of its matrix.
template <KvType kType>
__device__ int stored_at(bool is_key, int i, int slot) {
    if (!is_key) return (i / 32 * kPageTokens + slot) * 32 + i % 32;
    return kType == KvType::Q8_0 ? (i / 4 * kPageTokens + slot) * 4 + i % 4 : i * kPageTokens + slot;
}

template <KvType kType>
__device__ void store_head(const KvHeadLayout& layout, int head_dim, bool is_key, const float* from, int slot,
                           std::byte* part) {
    std::byte* numbers = part + (is_key ? layout.keys : layout.values);
    for (int block = 0; block < head_dim; block += kLanes) {
        const int i = block + lane();
        const float x = i < head_dim ? from[i] : 0;
        const int at = stored_at<kType>(is_key, i, slot);
        if constexpr (kType == KvType::Q8_0) {
            // By the bits of magnitudes NaN is more than infinity, and that more than all numbers.
            const float largest = __uint_as_float(max_lanes(__float_as_uint(x) & 0x7fffffff));
            const float scale = largest / 127;
            const unsigned exponent = __float_as_uint(scale) >> 23;
            const bool is_normal = exponent != 0 && exponent != 255;
            const float rounded = is_normal ? rintf(x * (127 / largest)) : 0;
            reinterpret_cast<int8_t*>(numbers)[at] = static_cast<int8_t>(rounded);
            float* scales = reinterpret_cast<float*>(part + (is_key ? layout.key_scales : layout.value_scales));
            if (lane() == 0) scales[block / 32 * kPageTokens + slot] = scale;
        } else if (i < head_dim) {
            if constexpr (kType == KvType::F32)
                reinterpret_cast<float*>(numbers)[at] = x;
            else if constexpr (kType == KvType::F16)
                reinterpret_cast<__half*>(numbers)[at] = round_to<__half>(x);
            else
                reinterpret_cast<__nv_bfloat16*>(numbers)[at] = round_to<__nv_bfloat16>(x);
        }
    }
}

// Heads of a row: queries, then keys, then values.
template <KvType kType>
__global__ void __launch_bounds__(kHeads* kLanes)
    place_kernel(Places places, AttentionLayer layer, float* q, const float* k, const float* v) {
    __shared__ float placed[kHeads][kMaxHeadDim];
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.y, n_q = layer.n_heads, n_kv = layer.n_kv_heads, head_dim = layer.head_dim;
    const int i = blockIdx.x * kHeads + group();
    const size_t kv_row = static_cast<size_t>(row) * n_kv;
    const bool is_key = i >= n_q && i < n_q + n_kv, is_value = i >= n_q + n_kv && i < n_q + 2 * n_kv;
    if (i < n_q) {
        float* head = q + (static_cast<size_t>(row) * n_q + i) * head_dim;
        place_head(layer, head, layer.q_norm, row, layer.query_scale, head);
    } else if (is_key) {
        place_head(layer, k + (kv_row + i - n_q) * head_dim, layer.k_norm, row, 1, placed[group()]);
    }
    __syncthreads();  // lanes read components that others have rotated
    if (is_key || is_value) {
        const int kv_head = is_key ? i - n_q : i - n_q - n_kv, position = places.positions[row];
        std::byte* part =
            const_cast<std::byte*>(page_part(places, layer, places.segment_of[row], position / kPageTokens, kv_head));
        store_head<kType>(layer.kv.layout, head_dim, is_key,
                          is_key ? placed[group()] : v + (kv_row + kv_head) * head_dim, position % kPageTokens, part);
    }
}

}  // namespace

void rope_angles(const Places& places, const double* inv_freq, int half, float* cosines, float* sines,
                 cudaStream_t stream) {
    launch(rope_kernel, dim3((places.n * half + kAngles - 1) / kAngles), dim3(kAngles), 0, stream, places, inv_freq,
           half, cosines, sines);
}

void place_heads(const Places& places, const AttentionLayer& layer, float* q, const float* k, const float* v,
                 cudaStream_t stream) {
    const dim3 grid((layer.n_heads + 2 * layer.n_kv_heads + kHeads - 1) / kHeads, places.n);
    const auto start = [&](auto kernel) {
        launch(kernel, grid, dim3(kHeads * kLanes), 0, stream, places, layer, q, k, v);
    };
    switch (layer.kv.type) {
        case KvType::F32:
            return start(place_kernel<KvType::F32>);
        case KvType::F16:
            return start(place_kernel<KvType::F16>);
        case KvType::BF16:
            return start(place_kernel<KvType::BF16>);
        case KvType::Q8_0:
            return start(place_kernel<KvType::Q8_0>);
    }
}

}  // namespace gemmart::gpu
