#include "cuda/gemm.cuh"
#include "cuda/gemm_sources.cuh"
#include "cuda/gemm_start.cuh"

namespace gemmart::gpu {

void gemm_planes(const GemmJob& job, const __nv_bfloat16* hi, const __nv_bfloat16* lo, cudaStream_t stream) {
    if (lo)
        start_gemm<Planes<2>, 2>(job, {hi, lo, job.n, job.n_cols}, stream);
    else
        start_gemm<Planes<1>, 1>(job, {hi, lo, job.n, job.n_cols}, stream);
}

}  // namespace gemmart::gpu
