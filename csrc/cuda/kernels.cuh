// What the executor calls: functions of the host that start kernels on a stream. All pointers are to memory of the
// device unless a comment says otherwise. They throw DeviceError and allocate nothing.
//
// A pass has rows of two kinds. FEW rows are those of segments of at most kFewTokens tokens (decoding, verifying
// guesses); each of their numbers comes from one chain of operations that does not depend on the other rows, so that a
// sequence says the same alone and in company. MANY rows belong to longer segments (prompts) and go through tensor
// cores. The few ones stand first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"
#include "decoder.h"
#include "kv_layout.h"
#include "tensor.h"

namespace gemmart::gpu {

inline constexpr int kFewTokens = 8;
inline constexpr int kRange =
    256;  // positions; of few rows, each range of a softmax is computed by itself (cpu/kernels.h)
inline constexpr int kGroup = 32;  // columns that share an activation scale; n_cols of every matrix is a multiple

// ---- rows: what products are multiplied with (rows.cu)

// n rows of n_cols numbers. Rows [0, n_few) in two forms: rounded, for formats of integers, x ≈ d · v with v = q, or
// v = 256 q + q_low where q_low is not null (the rule of rounding is kernels.h's quantize() of the CPU, with a d that
// is not rounded itself); and unrounded, for the others. Rows [n_few, n): x ≈ hi, or hi + lo where lo is not null.
struct Rows {
    int n, n_few, n_cols;
    int8_t *q, *q_low;       // [n_few, n_cols]
    float* d;                // [n_few, n_cols / 32]
    int32_t* sums;           // [n_few, n_cols / 16] Σ v
    float* x;                // [n_few, n_cols]
    __nv_bfloat16 *hi, *lo;  // [n - n_few, n_cols]
};
// Bytes of memory for `n` rows, and the rows in it (both terms of each kind).
size_t rows_bytes(int n, int n_cols);
Rows rows_at(std::byte* memory, int n, int n_few, int n_cols);

// Row i of `to` <- the norm of residual[row], where row = rows ? rows[i] : i; before that, where proj [n, dim] is
// given, residual[row] += proj[i], or its norm with post_norm.
struct NormJob {
    int dim;
    float eps;
    float* residual;         // [.., dim]
    const int32_t* rows;     // [to.n], or null
    const float* proj;       // [to.n, dim], or null
    const float* post_norm;  // [dim], or null
    const float* norm;       // [dim]; null: the residual is only added to, and `to` not written
    float* states;           // [to.n, dim] or null: the norm, unrounded
};
void norm_rows(const NormJob& job, const Rows& to, cudaStream_t stream);
// to <- x [n, n_cols]; x[i] at row rows[i] if rows is given.
void convert_rows(const float* x, const int32_t* rows, const Rows& to, cudaStream_t stream);
// to <- act(gate) · up, both [n, n_cols]
void gate_rows(Activation act, const float* gate, const float* up, const Rows& to, cudaStream_t stream);

// ---- products (weights.cu, gemv.cu, gemm.cu; cublas.cu in modules that have it)

struct Matrix {
    DType dtype;
    int n_rows, n_cols;
    std::byte* data;  // in the layout of weights.cuh, aligned to 256 bytes
};
size_t matrix_bytes(DType dtype, int n_rows, int n_cols);
// Rows [first_row, first_row + n_rows) of w from `raw`, where they stand as in the file; first_row a multiple of 32.
void pack_rows(const Matrix& w, const std::byte* raw, int first_row, int n_rows, cudaStream_t stream);

struct Product {
    Matrix w;
    float* out;  // [x.n, ld_out]
    int ld_out;
};
// Bytes of scratch that products with up to n_many rows of MANY kind and any of these matrices want.
size_t multiply_scratch_bytes(const Matrix& w, int n_many);
// Each product's out = x · wᵀ. own_gemm: with our own kernels in any case.
void multiply(const Product* products, int n_products, const Rows& x, std::byte* scratch, bool own_gemm,
              cudaStream_t stream);
const char* gemm_name();  // "tinyblas", "cublas", "hipblas"

// ---- attention (attention.cu)

// What a pass knows of its rows, on the device.
struct Places {
    int n, n_few, n_segments, n_few_segments;
    const int32_t* positions;   // [n]
    const int32_t* segment_of;  // [n]
    const int32_t* first_row;   // [n_segments + 1]
    int max_pages;              // a segment
    const int32_t* pages[2];    // by group: [n_segments, max_pages] page ids, -1: given back
    int last_position;          // the largest of all, of the host
};
// cosines, sines [n, half] <- of position · inv_freq [half], computed in double
void rope_angles(const Places& places, const double* inv_freq, int half, float* cosines, float* sines,
                 cudaStream_t stream);

struct KvLayerPart {
    KvType type;
    KvHeadLayout layout;  // of kv_layout.h, the same bytes as on the CPU
    std::byte* base;      // page p's part of this layer begins at base + p · page_bytes
    size_t page_bytes;
    int group;
};

struct AttentionLayer {
    int n_heads, n_kv_heads, head_dim;  // head_dim: a multiple of 8, at most 256; a multiple of 32 for Q8_0
    int window;
    float query_scale, softcap;
    bool neox;
    const float *q_norm, *k_norm;  // [head_dim], or null
    const float *cosines, *sines;  // [n, head_dim / 2]
    float eps;
    KvLayerPart kv;
};
// q [n, n_heads, head_dim], k [n, n_kv_heads, head_dim] are normed and rotated, q scaled; k, v go to the cache.
void place_heads(const Places& places, const AttentionLayer& layer, float* q, const float* k, const float* v,
                 cudaStream_t stream);
// Bytes of scratch for n_few rows that see up to n_positions.
size_t attention_scratch_bytes(int n_few, int n_heads, int head_dim, int n_positions);
// out [n, n_heads, head_dim] <- attention of q. FEW rows: ranges of 256 positions by themselves, added in order.
void attention(const Places& places, const AttentionLayer& layer, const float* q, float* out, std::byte* scratch,
               cudaStream_t stream);

// ---- logits (select.cu): gemmart_select() of executor_abi.h tests select()

// logits [n, n_vocab] <- cap · tanh(logits / cap) where cap is not 0; finite[i] <- whether row i is. n_cols need not
// be n_vocab: states are judged too.
void cap_logits(float* logits, int n, int n_cols, float cap, uint8_t* finite, cudaStream_t stream);

// Of the host's values; arrays on the device.
struct SelectJob {
    const float* logits;  // [n_vocab]
    int n_vocab, k;
    int n_bias, n_recent;
    const int32_t *bias_ids, *recent;
    const float* bias;
    float repeat_penalty, presence_penalty, frequency_penalty;
    const int32_t* mask;  // or null
    int32_t* ids;         // [k]
    float* best;          // [k]
    double* logsumexp;    // [1]
    int32_t* n_found;     // [1]
};
size_t select_scratch_bytes(int n_vocab, int k);
void select(const SelectJob& job, std::byte* scratch, cudaStream_t stream);

}  // namespace gemmart::gpu
