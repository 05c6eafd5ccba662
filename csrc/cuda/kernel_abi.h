// Kernels of a module on arrays of the host, for tests and measurements: plain C without macros, as executor_abi.h.
// Every function copies its arrays to the device and back and returns a status of executor_abi.h.
#ifndef GEMMART_KERNEL_ABI_H
#define GEMMART_KERNEL_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// out [n, n_rows] = x [n, n_cols] · wᵀ; w: rows of the format `dtype` as in a file. The first n_few rows are FEW ones
// (kernels.cuh). terms: 1, or 2 for activations of two terms. own_gemm: 0 where cuBLAS may multiply. repeats: how often
// the product alone is computed; seconds: of all of these on the device.
int32_t gemmart_kernel_multiply(uint32_t dtype, int32_t n_rows, int32_t n_cols, const void* w, int32_t n, int32_t n_few,
                                int32_t terms, int32_t own_gemm, const float* x, float* out, int32_t repeats,
                                double* seconds);
// residual [n, dim] += proj [n, dim] (null: nothing), normed with post_norm [dim] where it is given; states [n, dim] <-
// the norm with norm [dim]; rounded [n, dim] <- what the forms of Rows say of it: d · v of FEW rows, hi + lo of others.
int32_t gemmart_kernel_norm(int32_t n, int32_t n_few, int32_t dim, float eps, float* residual, const float* proj,
                            const float* post_norm, const float* norm, int32_t terms, float* states, float* rounded);
// rounded [n, n_cols] as above, of act(gate) · up
int32_t gemmart_kernel_gate(int32_t silu, int32_t n, int32_t n_few, int32_t n_cols, const float* gate, const float* up,
                            int32_t terms, float* rounded);

typedef struct GemmartAttentionTest {
    int32_t n_segments;
    const int32_t *starts, *n_tokens;  // [n_segments] positions; segments of few tokens first
    const int32_t* pages;              // [n_segments, max_pages] page ids of the layer's only group
    int32_t max_pages, n_pages;        // n_pages: of kv
    int32_t n_heads, n_kv_heads, head_dim, window, neox, kv_type;
    float query_scale, softcap, eps;
    const float *q_norm, *k_norm;  // [head_dim] or null
    const double* inv_freq;        // [head_dim / 2]
    const float *q, *k, *v;        // [n, n_heads or n_kv_heads, head_dim] before norm and rope
    void* kv;                      // [n_pages] parts of a page as in kv_layout.h; the new keys and values are added
    float* out;                    // [n, n_heads, head_dim]
    int32_t repeats;               // of the attention
    double seconds;
} GemmartAttentionTest;
int32_t gemmart_kernel_attention(GemmartAttentionTest* test);

// logits [n, n_cols] <- capped where cap is not 0; finite [n]
int32_t gemmart_kernel_cap(int32_t n, int32_t n_cols, float cap, float* logits, uint8_t* finite);

typedef struct GemmartSelectTest {
    float* logits;  // [n_vocab], as they are on the device afterwards
    int32_t n_vocab, k;
    int32_t n_bias, n_recent;
    const int32_t *bias_ids, *recent;
    const float* bias;
    float repeat_penalty, presence_penalty, frequency_penalty;
    const int32_t* mask;  // [ceil(n_vocab / 32)] or null
    int32_t* ids;         // [k]
    float* best;          // [k]
    double logsumexp;
    int32_t n_found;
} GemmartSelectTest;
int32_t gemmart_kernel_select(GemmartSelectTest* test);

#ifdef __cplusplus
}
#endif

#endif
