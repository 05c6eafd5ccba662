// gemm_panels() for activations of kTermsX terms, in a file of its own each so that compilers work side by side.
#pragma once

#include <type_traits>

#include "cuda/gemm.cuh"
#include "cuda/gemm_sources.cuh"
#include "cuda/gemm_start.cuh"

namespace gemmart::gpu {

template <int kTermsX>
void start_panels(const GemmJob& job, const Matrix& w, cudaStream_t stream) {
    const PanelsView view = {w.data, (w.n_rows + kPanel - 1) / kPanel, units_of(w.n_cols), w.n_cols};
    with_block(w.dtype, [&](auto type) {
        using Block = typename decltype(type)::type;
        constexpr int kTermsW = Packed<Block>::kKind == Kind::Floats ? 2 : kTermsX;
        if constexpr (std::is_same_v<Block, BlockBF16>)
            start_gemm<CopiedPanels, kTermsX>(job, {view}, stream);
        else if constexpr (Packed<Block>::kKind != Kind::Blocks)
            start_gemm<DecodedPanels<Block, kTermsW>, kTermsX>(job, {view}, stream);
    });
}

}  // namespace gemmart::gpu
