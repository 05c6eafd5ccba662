// cuBLAS or hipBLAS for products of MANY rows: in modules that are compiled with -DGEMMART_BLAS (cublas.cu).
#pragma once

#include <cstddef>

#include "cuda/device.cuh"

namespace gemmart::gpu {

const char* blas_name();        // "cublas", "hipblas"
size_t blas_workspace_bytes();  // that a call wants, so that it allocates nothing
// out [m, ld_out] = x [m, k] · wᵀ, w [n, k]; added to what is there if `add`
void blas_multiply(const __nv_bfloat16* x, const __nv_bfloat16* w, float* out, int m, int n, int k, int ld_out,
                   bool add, std::byte* workspace, cudaStream_t stream);

}  // namespace gemmart::gpu
