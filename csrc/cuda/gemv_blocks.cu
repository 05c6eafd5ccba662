// Formats that stand in blocks as in the file: decoded by formats/ where they are used, then as gemv_floats.cuh. A turn
// is a block; inputs are read where they are, since decoding takes longer.
#include "cuda/gemv.cuh"

namespace gemmart::gpu {
namespace {

template <typename Block, int kN>
__global__ void __launch_bounds__(register_threads(kN)) few_blocks(FewJob job) {
    using P = Packed<Block>;
    SHARED_MEMORY(shared);
    const FewPlace place = few_place(job);
    const std::byte* panel = few_panel<Block>(job, place);
    let_next_start();
    wait_for_previous();
    float sums[kN] = {};
    for (int turn = group(); turn < job.n_turns; turn += blockDim.x / 32) {
        float w[Block::kSize];
        decode(P::block(panel, lane(), turn), w);
        for (int begin = 0; begin < Block::kSize; begin += kGroup) {
            float added[kN] = {};
            for (int k = begin; k < begin + kGroup; ++k) {
#pragma unroll
                for (int c = 0; c < kN; ++c) {
                    const float* x = job.x + static_cast<size_t>(place.first + c) * job.n_cols;
                    if (c < place.n) added[c] = fmaf(w[k], x[turn * Block::kSize + k], added[c]);
                }
            }
#pragma unroll
            for (int c = 0; c < kN; ++c) sums[c] += added[c];
        }
    }
    add_warps(job, place, sums, reinterpret_cast<float*>(shared));
}

}  // namespace

FewKernel few_block_kernel(DType dtype, int n) {
    return with_kind<Kind::Blocks, 0>(dtype, [&](auto type) -> FewKernel {
        using Block = typename decltype(type)::type;
        if (n == 1) return {few_blocks<Block, 1>, 1, Block::kSize, 0};
        return {few_blocks<Block, 8>, 8, Block::kSize, 0};
    });
}

}  // namespace gemmart::gpu
