// Formats of integers: dot products of bytes with rounded inputs are exact; scales and offsets come in afterwards.
//
//   sum = sum + (scale · Σ (code − bias) v) · d − offset · (d Σ v)
//
// for each group of 32 columns in order; where 16 columns have a scale, t = scale0 · Σ0 + scale1 · Σ1, then t · d, then
// two offsets. A sum of products of one term starts at the bits of 1.5 · 2^23, minus what bias there is, and is the
// float 1.5 · 2^23 + Σ when it is done: conversions would be four times as slow. Sums of two terms do not fit and are
// converted.
#pragma once

#include "cuda/gemv.cuh"

namespace gemmart::gpu {

inline constexpr int kSumBits = 0x4b400000;  // 1.5 · 2^23

// Of a row and a group of 32 columns, what integers are scaled by: by[0] (and by[1], of the second 16 columns) is d · Σ
// v where the format has offsets, otherwise the bits that sums begin with.
template <int kParts>
struct alignas(kParts == 1 ? 8 : 16) FewScale {
    float d;
    float by[kParts];
};

template <typename Block, int kN, bool kTwoTerms>
struct FewIntegers {
    using P = Packed<Block>;
    using Scale = FewScale<P::kParts>;
    static constexpr int kQBytes = kTwoTerms ? 2 * kGroup : kGroup;  // of a row's group
    static constexpr int kGroupBytes = kN * (kQBytes + static_cast<int>(sizeof(Scale)));

    // Groups [first, first + n) of the job's columns; beyond the last one zeros.
    static __device__ void stage(const FewJob& job, const FewPlace& place, int first, int n, unsigned char* shared) {
        auto* q = reinterpret_cast<uint4*>(shared);  // [n][kN][terms][2]
        constexpr int kPieces = kQBytes / 16;
        const int n_groups = job.n_cols / kGroup;
        for (int i = threadIdx.x; i < n * kN * kPieces; i += blockDim.x) {
            const int piece = i % kPieces, c = i / kPieces % kN, g = first + i / (kPieces * kN);
            const int8_t* from = piece < 2 ? job.q : job.q_low;
            q[i] = c < place.n && g < n_groups
                       ? *reinterpret_cast<const uint4*>(from + static_cast<size_t>(place.first + c) * job.n_cols +
                                                         g * kGroup + piece % 2 * 16)
                       : uint4{};
        }
        auto* scales = reinterpret_cast<Scale*>(shared + n * kN * kQBytes);  // [n][kN]
        for (int i = threadIdx.x; i < n * kN; i += blockDim.x) {
            const int c = i % kN, g = first + i / kN;
            int sums[2] = {0, 0};
            Scale scale = {};
            if (c < place.n && g < n_groups) {
                const size_t at = static_cast<size_t>(place.first + c) * n_groups + g;
                scale.d = job.d[at];
                sums[0] = job.sums[2 * at], sums[1] = job.sums[2 * at + 1];
            }
            if constexpr (P::kParts == 1) sums[0] += sums[1];
#pragma unroll
            for (int part = 0; part < P::kParts; ++part)
                scale.by[part] = P::kOffset ? scale.d * static_cast<float>(sums[part])
                                            : __int_as_float((kTwoTerms ? 0 : kSumBits) - P::kBias * sums[part]);
            scales[i] = scale;
        }
    }

    // Σ code · v of the words [first, first + kWords), from `start` on.
    template <int kWords>
    static __device__ __forceinline__ float dot(const unsigned (&codes)[8], int first, const int* q, const int* low,
                                                int start) {
        int sum = start;
        if constexpr (kTwoTerms) {
            int high = 0;
#pragma unroll
            for (int i = first; i < first + kWords; ++i) {
                high = dot4(static_cast<int>(codes[i]), q[i], high);
                sum = dot4(static_cast<int>(codes[i]), low[i], sum);
            }
            return static_cast<float>(256 * high + sum);
        } else {
#pragma unroll
            for (int i = first; i < first + kWords; ++i) sum = dot4(static_cast<int>(codes[i]), q[i], sum);
            return __int_as_float(sum) - 12582912.f;
        }
    }

    // One group of a lane's row. q: of this group, [kN]; scales likewise.
    static __device__ __forceinline__ void multiply(const unsigned (&codes)[8], const float (&scale)[2],
                                                    const float (&offset)[2], const uint4* q, const Scale* scales,
                                                    float (&sums)[kN]) {
        constexpr int kStart = kTwoTerms ? 0 : kSumBits;
#pragma unroll
        for (int c = 0; c < kN; ++c) {
            const Scale by = scales[c];
            uint4 pieces[kQBytes / 16];
#pragma unroll
            for (int i = 0; i < kQBytes / 16; ++i) pieces[i] = q[c * (kQBytes / 16) + i];
            int v[8], low[8];
            memcpy(v, pieces, sizeof v);
            if constexpr (kTwoTerms) memcpy(low, pieces + 2, sizeof low);
            float t;
            if constexpr (P::kParts == 1) {
                t = scale[0] * dot<8>(codes, 0, v, low, P::kOffset ? kStart : __float_as_int(by.by[0]));
            } else {
                const float first = dot<4>(codes, 0, v, low, P::kOffset ? kStart : __float_as_int(by.by[0]));
                const float second = dot<4>(codes, 4, v, low, P::kOffset ? kStart : __float_as_int(by.by[1]));
                t = fmaf(scale[1], second, scale[0] * first);
            }
            sums[c] = fmaf(t, by.d, sums[c]);
            if constexpr (P::kOffset) {
#pragma unroll
                for (int part = 0; part < P::kParts; ++part) sums[c] = fmaf(-offset[part], by.by[part], sums[c]);
            }
        }
    }
};

// A lane's weights of a turn, as loaded.
template <typename P>
struct FewTurn {
    typename P::Head head;
    typename P::Codes codes[P::kTurn];
};
// Where a turn's weights are.
template <typename P>
struct FewSource {
    static constexpr int kTurns = kUnit / kGroup / P::kTurn;  // of a unit
    const std::byte* unit;
    int first;  // of its groups

    __device__ __forceinline__ FewSource(const std::byte* panel, unsigned turn)
        : unit(panel + static_cast<size_t>(turn / kTurns) * (kPanel * P::kLaneBytes)),
          first(turn % kTurns * P::kTurn) {}
    __device__ __forceinline__ typename P::Head head() const { return P::load_head(unit, lane(), first); }
    __device__ __forceinline__ typename P::Codes codes(int i) const { return P::load_codes(unit, lane(), first + i); }
};

template <typename Block, int kN, bool kTwoTerms>
__global__ void __launch_bounds__(register_threads(kN, kTwoTerms)) few_integers(FewJob job) {
    using P = Packed<Block>;
    using F = FewIntegers<Block, kN, kTwoTerms>;
    SHARED_MEMORY(shared);
    const FewPlace place = few_place(job);
    const std::byte* panel = few_panel<Block>(job, place);
    const int n_warps = blockDim.x / 32;
    int turn = group();
    FewTurn<P> weights;  // there is a turn for each warp
    const FewSource<P> source(panel, turn);
    weights.head = source.head();
#pragma unroll
    for (int i = 0; i < P::kTurn; ++i) weights.codes[i] = source.codes(i);
    let_next_start();
    wait_for_previous();

    const int stage_groups = job.rounds_of_a_stage * n_warps * P::kTurn;
    const auto* scales = reinterpret_cast<const typename F::Scale*>(shared + stage_groups * kN * F::kQBytes);
    float sums[kN] = {};
    for (int begin = 0; begin < job.n_turns; begin += job.rounds_of_a_stage * n_warps) {
        if (begin) __syncthreads();
        F::stage(job, place, begin * P::kTurn, stage_groups, shared);
        __syncthreads();
        for (int round = 0; round < job.rounds_of_a_stage && turn < job.n_turns; ++round, turn += n_warps) {
            const bool more = turn + n_warps < job.n_turns;
            const FewSource<P> next(panel, turn + n_warps);
            const typename P::Head head = weights.head;
            if (more) weights.head = next.head();
            const int first = static_cast<unsigned>(turn) % FewSource<P>::kTurns * P::kTurn;
            const int staged = (turn - begin) * P::kTurn;
            const uint4* q = reinterpret_cast<const uint4*>(shared) + staged * (kN * F::kQBytes / 16);
#pragma unroll
            for (int i = 0; i < P::kTurn; ++i) {
                unsigned codes[8];
                float scale[2], offset[2];
                P::unpack(weights.codes[i], codes);
                if (more) weights.codes[i] = next.codes(i);
                P::scales(head, first, i, scale, offset);
                F::multiply(codes, scale, offset, q + i * (kN * F::kQBytes / 16), scales + (staged + i) * kN, sums);
            }
        }
    }
    add_warps(job, place, sums, reinterpret_cast<float*>(shared));
}

template <int kSize>
FewKernel few_integer_kernel(DType dtype, int n, bool two_terms) {
    return with_kind<Kind::Integers, kSize>(dtype, [&](auto type) {
        using Block = typename decltype(type)::type;
        return with_rows(n, [&](auto rows) -> FewKernel {
            constexpr int kN = decltype(rows)::value, kColumns = Packed<Block>::kTurn * kGroup;
            if (two_terms)
                return {few_integers<Block, kN, true>, kN, kColumns, FewIntegers<Block, kN, true>::kGroupBytes};
            return {few_integers<Block, kN, false>, kN, kColumns, FewIntegers<Block, kN, false>::kGroupBytes};
        });
    });
}

}  // namespace gemmart::gpu
