#include "cuda/gemm_panels.cuh"

namespace gemmart::gpu {

bool has_gemm_panels(DType dtype) {
    return with_block(dtype, [](auto type) { return Packed<typename decltype(type)::type>::kKind != Kind::Blocks; });
}

void gemm_panels(const GemmJob& job, const Matrix& w, cudaStream_t stream) { start_panels<1>(job, w, stream); }

}  // namespace gemmart::gpu
