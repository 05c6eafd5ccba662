#include "cuda/gemm.cuh"
#include "cuda/gemm_sources.cuh"
#include "cuda/gemm_start.cuh"

namespace gemmart::gpu {

bool has_gemm_panels(DType dtype) {
    return with_block(dtype, [](auto type) { return Packed<typename decltype(type)::type>::kKind != Kind::Blocks; });
}

void gemm_panels(const GemmJob& job, const Matrix& w, cudaStream_t stream) {
    const PanelsView view = {w.data, (w.n_rows + kPanel - 1) / kPanel, units_of(w.n_cols), w.n_cols};
    with_block(w.dtype, [&](auto type) {
        using Block = typename decltype(type)::type;
        if constexpr (std::is_same_v<Block, BlockBF16>)
            job.x_lo ? start_gemm<CopiedPanels, 2>(job, {view}, stream)
                     : start_gemm<CopiedPanels, 1>(job, {view}, stream);
        else if constexpr (Packed<Block>::kKind == Kind::Floats)
            job.x_lo ? start_gemm<DecodedPanels<Block, 2>, 2>(job, {view}, stream)
                     : start_gemm<DecodedPanels<Block, 2>, 1>(job, {view}, stream);
        else if constexpr (Packed<Block>::kKind == Kind::Integers)
            job.x_lo ? start_gemm<DecodedPanels<Block, 2>, 2>(job, {view}, stream)
                     : start_gemm<DecodedPanels<Block, 1>, 1>(job, {view}, stream);
    });
}

}  // namespace gemmart::gpu
