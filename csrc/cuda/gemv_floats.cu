// Formats of floats, with unrounded inputs: the products of a group of 32 columns are added in order, then to the sum
// of the groups before.
#include "cuda/gemv.cuh"

namespace gemmart::gpu {
namespace {

// Inputs of groups [first, first + n), [n][kN][32]; beyond the last one zeros.
template <int kN>
__device__ void stage_floats(const FewJob& job, const FewPlace& place, int first, int n, float4* shared) {
    for (int i = threadIdx.x; i < n * kN * 8; i += blockDim.x) {
        const int c = i / 8 % kN, col = (first + i / (8 * kN)) * kGroup + i % 8 * 4;
        const float* from = job.x + static_cast<size_t>(place.first + c) * job.n_cols + col;
        shared[i] = c < place.n && col < job.n_cols ? *reinterpret_cast<const float4*>(from) : float4{};
    }
}

template <typename Block, int kN>
__global__ void __launch_bounds__(register_threads(kN == 1 ? 2 : kN)) few_floats(FewJob job) {
    using P = Packed<Block>;
    constexpr int kPieces = P::kTurn * P::kPieces;
    SHARED_MEMORY(shared);
    const FewPlace place = few_place(job);
    const std::byte* panel = few_panel<Block>(job, place);
    const int n_warps = blockDim.x / 32;
    int turn = group();
    uint4 pieces[kPieces];
    // A panel's pieces stand in order of column.
    const auto load = [&](int of_turn, int i) {
        return load_plane<uint4>(panel, 16 * (of_turn * kPieces + i), lane());
    };
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = load(turn, i);
    let_next_start();
    wait_for_previous();

    const int stage_groups = job.rounds_of_a_stage * n_warps * P::kTurn;
    float sums[kN] = {};
    for (int begin = 0; begin < job.n_turns; begin += job.rounds_of_a_stage * n_warps) {
        if (begin) __syncthreads();
        stage_floats<kN>(job, place, begin * P::kTurn, stage_groups, reinterpret_cast<float4*>(shared));
        __syncthreads();
        for (int round = 0; round < job.rounds_of_a_stage && turn < job.n_turns; ++round, turn += n_warps) {
            const bool more = turn + n_warps < job.n_turns;
            const float4* x = reinterpret_cast<const float4*>(shared) + (turn - begin) * P::kTurn * kN * 8;
#pragma unroll
            for (int g = 0; g < P::kTurn; ++g) {
                float added[kN] = {};
#pragma unroll
                for (int i = 0; i < P::kPieces; ++i) {
                    float w[P::kColumns];
                    P::unpack_piece(pieces[g * P::kPieces + i], w);
                    if (more) pieces[g * P::kPieces + i] = load(turn + n_warps, g * P::kPieces + i);
#pragma unroll
                    for (int c = 0; c < kN; ++c) {
#pragma unroll
                        for (int k = 0; k < P::kColumns; k += 4) {
                            const float4 v = x[(g * kN + c) * 8 + (i * P::kColumns + k) / 4];
                            added[c] = fmaf(w[k], v.x, added[c]);
                            added[c] = fmaf(w[k + 1], v.y, added[c]);
                            added[c] = fmaf(w[k + 2], v.z, added[c]);
                            added[c] = fmaf(w[k + 3], v.w, added[c]);
                        }
                    }
                }
#pragma unroll
                for (int c = 0; c < kN; ++c) sums[c] += added[c];
            }
        }
    }
    add_warps(job, place, sums, reinterpret_cast<float*>(shared));
}

}  // namespace

FewKernel few_float_kernel(DType dtype, int n) {
    return with_kind<Kind::Floats, 0>(dtype, [&](auto type) {
        using Block = typename decltype(type)::type;
        return with_rows(n, [](auto rows) -> FewKernel {
            constexpr int kN = decltype(rows)::value;
            return {few_floats<Block, kN>, kN, Packed<Block>::kTurn * kGroup, kN * kGroup * 4};
        });
    });
}

}  // namespace gemmart::gpu
