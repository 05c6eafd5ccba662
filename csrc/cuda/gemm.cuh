// The ways that products of MANY rows go, for gemm.cu to choose from.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/kernels.cuh"

namespace gemmart::gpu {

// Whether gemm_panels() knows the format: those that stand in blocks have to be decoded first.
bool has_gemm_panels(DType dtype);
// job.out = x · wᵀ with w decoded inside of the product; precise: x has two terms.
void gemm_panels(const GemmJob& job, const Matrix& w, cudaStream_t stream);
void gemm_panels_precise(const GemmJob& job, const Matrix& w, cudaStream_t stream);
// The same with w [job.n, n_cols] ≈ hi, or hi + lo where x has two terms.
void gemm_planes(const GemmJob& job, const __nv_bfloat16* hi, const __nv_bfloat16* lo, cudaStream_t stream);

// Rows [first_row, first_row + n_rows) of w as bf16, [n_rows, n_cols] each; lo: what hi leaves, or null. first_row: a
// multiple of 32.
void decode_rows(const Matrix& w, int first_row, int n_rows, __nv_bfloat16* hi, __nv_bfloat16* lo, cudaStream_t stream);

}  // namespace gemmart::gpu
