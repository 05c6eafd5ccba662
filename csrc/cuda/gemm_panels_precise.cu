#include "cuda/gemm_panels.cuh"

namespace gemmart::gpu {

void gemm_panels_precise(const GemmJob& job, const Matrix& w, cudaStream_t stream) { start_panels<2>(job, w, stream); }

}  // namespace gemmart::gpu
