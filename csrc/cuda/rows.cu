// What products are multiplied with: norms, gates and plain rows in the forms of Rows. A lane holds four neighbouring
// columns, eight lanes a group that shares a scale; each block has one row, whose numbers depend on nothing else.
#include "cuda/kernels.cuh"
#include "formats/common.h"

namespace gemmart::gpu {
namespace {

constexpr int kThreads = 256;          // of a block where rows are divided among several
constexpr int kMaxNormThreads = 1024;  // a norm needs its row in one block

template <typename T>
T* take(std::byte*& memory, size_t n) {
    T* taken = reinterpret_cast<T*>(memory);
    memory += (n * sizeof(T) + 255) / 256 * 256;
    return taken;
}

// The four bytes of q.
__device__ __forceinline__ int bytes_of(const int (&q)[4]) {
    return (q[0] & 255) | (q[1] & 255) << 8 | (q[2] & 255) << 16 | q[3] << 24;
}

// Columns col … col + 3 of a few row, in both forms. All lanes of a group call it; inside: whether there is such a
// column.
__device__ void put_few(const Rows& to, int row, int col, bool inside, const float (&x)[4]) {
    int largest = 0;  // of the bits without sign: NaN > infinity > all finite numbers
    for (float number : x) {
        int bits;
        memcpy(&bits, &number, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) {
        const int other = shuffle_xor(largest, mask);
        largest = other > largest ? other : largest;
    }
    const float coarse = float_from_bits(static_cast<uint32_t>(largest)) / 127;
    const float d = to.q_low ? coarse / 256 : coarse;
    const bool normal = d >= 0x1p-126f && d < 0x1p127f;  // otherwise v is 0, and what is not finite shows in d
    const float inverse = normal ? 1 / coarse : 0;
    int q[4], low[4], sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float rounded = normal ? rintf(x[i] * inverse) : 0;
        q[i] = static_cast<int>(rounded);
        low[i] = 0;
        if (to.q_low && normal) {
            const float rest = rintf(fmaf(-coarse, rounded, x[i]) * (256 * inverse));
            low[i] = static_cast<int>(fminf(fmaxf(rest, -127), 127));
        }
        sum += to.q_low ? 256 * q[i] + low[i] : q[i];
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (!inside) return;
    const size_t at = static_cast<size_t>(row) * to.n_cols + col;
    *reinterpret_cast<int*>(to.q + at) = bytes_of(q);
    if (to.q_low) *reinterpret_cast<int*>(to.q_low + at) = bytes_of(low);
    if (col % kGroup == 0) to.d[at / kGroup] = d;
    if (col % 16 == 0) to.sums[at / 16] = sum;
    *reinterpret_cast<float4*>(to.x + at) = float4{x[0], x[1], x[2], x[3]};
}

__device__ void put_bfloat16(__nv_bfloat16* to, const __nv_bfloat16 (&x)[4]) {
    uint2 bits;
    memcpy(&bits, x, sizeof bits);
    *reinterpret_cast<uint2*>(to) = bits;
}

__device__ void put_many(const Rows& to, int row, int col, const float (&x)[4]) {
    const size_t at = static_cast<size_t>(row - to.n_few) * to.n_cols + col;
    __nv_bfloat16 hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        hi[i] = round_to<__nv_bfloat16>(x[i]);
        lo[i] = round_to<__nv_bfloat16>(x[i] - to_float(hi[i]));
    }
    put_bfloat16(to.hi + at, hi);
    if (to.lo) put_bfloat16(to.lo + at, lo);
}

__device__ __forceinline__ void put(const Rows& to, int row, int col, bool inside, const float (&x)[4]) {
    if (row < to.n_few)
        put_few(to, row, col, inside, x);
    else if (inside)
        put_many(to, row, col, x);
}

// Four numbers, or zeros.
__device__ __forceinline__ void load4(const float* x, bool inside, float (&out)[4]) {
    const float4 v = inside ? *reinterpret_cast<const float4*>(x) : float4{0, 0, 0, 0};
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}
__device__ __forceinline__ void store4(float* to, const float (&x)[4]) {
    *reinterpret_cast<float4*>(to) = float4{x[0], x[1], x[2], x[3]};
}

// The block's sum of v, in all lanes, by a tree that the number of threads fixes; scratch [32].
__device__ float sum_block(float v, float* scratch) {
    v = sum_lanes(v);
    if (lane() == 0) scratch[group()] = v;
    __syncthreads();
    return sum_lanes(lane() * 32 < static_cast<int>(blockDim.x) ? scratch[lane()] : 0);
}

__device__ __forceinline__ float square(const float (&x)[4], float sum) {
#pragma unroll
    for (float number : x) sum = fmaf(number, number, sum);
    return sum;
}

// Every thread comes back to its own columns in three passes; the row stands in shared memory meanwhile.
__global__ void __launch_bounds__(kMaxNormThreads) norm(NormJob job, Rows to) {
    SHARED_MEMORY(shared);
    let_next_start();
    auto* scratch = reinterpret_cast<float*>(shared);  // [2][32]
    float* row = scratch + 64;                         // [dim]
    const int i = blockIdx.x, first = 4 * threadIdx.x, step = 4 * blockDim.x;
    wait_for_previous();
    float* residual = job.residual + static_cast<size_t>(job.rows ? job.rows[i] : i) * job.dim;
    const float* proj = job.proj + static_cast<size_t>(i) * job.dim;
    float v[4], added[4], weight[4], sum = 0, scale = 1;
    if (job.post_norm) {
        for (int col = first; col < job.dim; col += step) {
            load4(proj + col, true, v);
            store4(row + col, v);
            sum = square(v, sum);
        }
        scale = 1 / sqrtf(sum_block(sum, scratch) / job.dim + job.eps);
        sum = 0;
    }
    for (int col = first; col < job.dim; col += step) {
        load4(residual + col, true, v);
        if (job.proj) {
            load4(job.post_norm ? row + col : proj + col, true, added);
            if (job.post_norm) {
                load4(job.post_norm + col, true, weight);
#pragma unroll
                for (int k = 0; k < 4; ++k) added[k] = added[k] * scale * weight[k];
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) v[k] += added[k];
            store4(residual + col, v);
        }
        store4(row + col, v);
        sum = square(v, sum);
    }
    if (!job.norm) return;
    scale = 1 / sqrtf(sum_block(sum, scratch + 32) / job.dim + job.eps);
    for (int begin = 0; begin < job.dim; begin += step) {  // all lanes: rounding exchanges numbers
        const int col = begin + first;
        const bool inside = col < job.dim;
        load4(row + col, inside, v);
        load4(job.norm + col, inside, weight);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = v[k] * scale * weight[k];
        if (job.states && inside) store4(job.states + static_cast<size_t>(i) * job.dim + col, v);
        put(to, i, col, inside, v);
    }
}

__global__ void __launch_bounds__(kThreads) convert(const float* x, const int32_t* rows, Rows to) {
    let_next_start();
    wait_for_previous();
    const int i = blockIdx.y, col = 4 * (blockIdx.x * kThreads + threadIdx.x);
    const bool inside = col < to.n_cols;
    float v[4];
    load4(x + static_cast<size_t>(rows ? rows[i] : i) * to.n_cols + col, inside, v);
    put(to, i, col, inside, v);
}

// x / 2 · (1 + tanh(u / 2)) = x / (1 + exp(-u)): no cancellation
__device__ __forceinline__ float activate(Activation act, float x) {
    constexpr float kTwoRoots = 1.5957691216057308f;  // 2 · sqrt(2 / pi)
    const float u = act == Activation::Gelu ? kTwoRoots * (x + 0.044715f * x * x * x) : x;
    return x / (1 + expf(-u));
}

__global__ void __launch_bounds__(kThreads) gate(Activation act, const float* gate, const float* up, Rows to) {
    let_next_start();
    wait_for_previous();
    const int i = blockIdx.y, col = 4 * (blockIdx.x * kThreads + threadIdx.x);
    const bool inside = col < to.n_cols;
    const size_t at = static_cast<size_t>(i) * to.n_cols + col;
    float v[4], factor[4];
    load4(gate + at, inside, v);
    load4(up + at, inside, factor);
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = activate(act, v[k]) * factor[k];
    put(to, i, col, inside, v);
}

// A row's columns are divided among blocks of kThreads.
dim3 grid_of(const Rows& to) { return dim3((to.n_cols / 4 + kThreads - 1) / kThreads, to.n); }

}  // namespace

size_t rows_bytes(int n, int n_cols) {
    // few rows need more than others; 7 arrays may begin behind a gap
    const size_t a_group = 2 * kGroup + sizeof(float) + 2 * sizeof(int32_t) + kGroup * sizeof(float);
    return static_cast<size_t>(n) * (n_cols / kGroup) * a_group + 7 * 256;
}

Rows rows_at(std::byte* memory, int n, int n_few, int n_cols) {
    Rows rows = {};
    rows.n = n, rows.n_few = n_few, rows.n_cols = n_cols;
    const size_t few = static_cast<size_t>(n_few) * n_cols, many = static_cast<size_t>(n - n_few) * n_cols;
    rows.q = take<int8_t>(memory, few);
    rows.q_low = take<int8_t>(memory, few);
    rows.d = take<float>(memory, few / kGroup);
    rows.sums = take<int32_t>(memory, few / 16);
    rows.x = take<float>(memory, few);
    rows.hi = take<__nv_bfloat16>(memory, many);
    rows.lo = take<__nv_bfloat16>(memory, many);
    return rows;
}

void norm_rows(const NormJob& job, const Rows& to, cudaStream_t stream) {
    if (to.n == 0) return;
    const int lanes = (job.dim / 4 + 63) / 64 * 64;  // one a piece of four columns
    const int threads = lanes < kMaxNormThreads ? lanes : kMaxNormThreads;
    launch(norm, dim3(to.n), dim3(threads), (64 + static_cast<size_t>(job.dim)) * sizeof(float), stream, job, to);
}

void convert_rows(const float* x, const int32_t* rows, const Rows& to, cudaStream_t stream) {
    if (to.n) launch(convert, grid_of(to), dim3(kThreads), 0, stream, x, rows, to);
}

void gate_rows(Activation act, const float* gate_of, const float* up, const Rows& to, cudaStream_t stream) {
    if (to.n) launch(gate, grid_of(to), dim3(kThreads), 0, stream, act, gate_of, up, to);
}

}  // namespace gemmart::gpu
