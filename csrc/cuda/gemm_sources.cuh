// Where a block's weights come from (gemm_tile.cuh). A Source has kTerms bf16 terms a weight, and brings those of a
// step to shared memory, [kTerms][kN][kLd]: by copies without registers between (kCopied), or fetched ahead into
// registers and put there decoded.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/weights.cuh"

namespace gemmart::gpu {

// w = hi, or hi + lo, row by row.
template <int kTermsOf>
struct Planes {
    static constexpr int kTerms = kTermsOf;
    static constexpr bool kCopied = true;
    struct Fetched {};

    const __nv_bfloat16 *hi, *lo;  // [n_rows, n_cols]
    int n_rows, n_cols;

    template <typename Shape>
    __device__ __forceinline__ void copy(__nv_bfloat16* shared, int first_row, int step) const {
        copy_rows<Shape, Shape::kN>(shared, hi, first_row, n_rows, n_cols, step);
        if constexpr (kTerms == 2)
            copy_rows<Shape, Shape::kN>(shared + Shape::kN * Shape::kLd, lo, first_row, n_rows, n_cols, step);
    }
    template <typename Shape>
    __device__ __forceinline__ void fetch(Fetched&, int, int) const {}
    template <typename Shape>
    __device__ __forceinline__ void put(__nv_bfloat16*, const Fetched&, int) const {}
};

// A matrix as weights.cuh lays it out: what Panels and PackedWeights have in common.
struct PanelsView {
    const std::byte* data;
    int n_panels, n_units, n_cols;

    // The unit of row first_row + i, for rows that a panel has no more: of the last panel.
    template <typename Block>
    __device__ __forceinline__ const std::byte* unit(int first_row, int i, int group) const {
        return unit_at<Block>(data, n_units, min((first_row + i) / kPanel, n_panels - 1), group * kGroup / kUnit);
    }
};

// BF16: a group of a row is four pieces that can be copied.
struct CopiedPanels {
    static constexpr int kTerms = 1;
    static constexpr bool kCopied = true;
    struct Fetched {};

    PanelsView w;

    template <typename Shape>
    __device__ __forceinline__ void copy(__nv_bfloat16* shared, int first_row, int step) const {
        constexpr int kPieces = Shape::kK / 8;
        static_assert(Shape::kN * kPieces % kGemmThreads == 0);
#pragma unroll
        for (int i = 0; i < Shape::kN * kPieces / kGemmThreads; i++) {
            const int piece = i * kGemmThreads + threadIdx.x;
            const int row = piece % Shape::kN, c = piece / Shape::kN * 8, col = step * Shape::kK + c;
            if (col < w.n_cols)
                copy_async16(shared + row * Shape::kLd + c,
                             w.unit<BlockBF16>(first_row, row, col / kGroup) +
                                 (col % kUnit / 8 * kPanel + row % kPanel) * sizeof(uint4));
        }
    }
    template <typename Shape>
    __device__ __forceinline__ void fetch(Fetched&, int, int) const {}
    template <typename Shape>
    __device__ __forceinline__ void put(__nv_bfloat16*, const Fetched&, int) const {}
};

// What a thread holds of a group until the next step, and what it decodes it to.
template <typename Block, Kind kKind = Packed<Block>::kKind>
struct FetchedGroup;

template <typename Block>
struct FetchedGroup<Block, Kind::Floats> {
    typename Packed<Block>::Codes codes;

    __device__ __forceinline__ void load(const std::byte* unit, int lane, int g) {
        codes = Packed<Block>::load_codes(unit, lane, g);
    }
    __device__ __forceinline__ void decode(int, float (&out)[32]) const { Packed<Block>::unpack(codes, out); }
};

template <typename Block>
struct FetchedGroup<Block, Kind::Integers> {
    using P = Packed<Block>;
    typename P::Codes codes;
    typename P::Head head;

    __device__ __forceinline__ void load(const std::byte* unit, int lane, int g) {
        codes = P::load_codes(unit, lane, g);
        head = P::load_head(unit, lane, g / P::kTurn * P::kTurn);
    }
    // A code becomes a float by standing in the significand of another one; conversions are slow. Codes that have
    // neither bias nor offset are signed and have eight bits, 2^23 + 128 + code; others at most seven, 128 + code, so
    // that bias and offset go into the sum of an fmaf, where they are rounded to 2^-17 of a step at most.
    __device__ __forceinline__ void decode(int g, float (&out)[32]) const {
        constexpr bool kSigned = P::kBias == 0 && !P::kOffset;
        const int first = g / P::kTurn * P::kTurn;
        unsigned words[8];
        float scale[2], offset[2], sum[2];
        P::unpack(codes, words);
        P::scales(head, first, g - first, scale, offset);
#pragma unroll
        for (int part = 0; part < P::kParts; part++) {
            sum[part] = -(128.f + P::kBias) * scale[part];
            if constexpr (P::kOffset) sum[part] -= offset[part];
        }
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const int part = P::kParts * i / 32;
            if constexpr (kSigned) {
                const unsigned bits = __byte_perm(words[i / 4] ^ 0x80808080, 0x4b000000, 0x7440 + i % 4);
                out[i] = scale[part] * (float_from_bits(bits) - 8388736.f);
            } else {
                const unsigned bits = __byte_perm(words[i / 4], 0x43000000, 0x7044 + (i % 4 << 8));
                out[i] = fmaf(scale[part], float_from_bits(bits), sum[part]);
            }
        }
    }
};

// Eight floats as bf16, and what that leaves of them.
__device__ __forceinline__ uint4 round_eight(const float* x) {
    return {round_pair<__nv_bfloat16>(x[0], x[1]), round_pair<__nv_bfloat16>(x[2], x[3]),
            round_pair<__nv_bfloat16>(x[4], x[5]), round_pair<__nv_bfloat16>(x[6], x[7])};
}
__device__ __forceinline__ void subtract_eight(float* x, const uint4& rounded) {
    const uint32_t pairs[4] = {rounded.x, rounded.y, rounded.z, rounded.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = pair_to_floats<__nv_bfloat16>(pairs[i]);
        x[2 * i] -= pair.x, x[2 * i + 1] -= pair.y;
    }
}

// Any format but those that stand in blocks: a thread has a group of a row in each step.
template <typename Block, int kTermsOf>
struct DecodedPanels {
    static constexpr int kTerms = kTermsOf;
    static constexpr bool kCopied = false;
    using Fetched = FetchedGroup<Block>;

    PanelsView w;

    template <typename Shape>
    __device__ __forceinline__ void copy(__nv_bfloat16*, int, int) const {}
    template <typename Shape>
    __device__ __forceinline__ void fetch(Fetched& to, int first_row, int step) const {
        const int group = min(step * (Shape::kK / kGroup) + static_cast<int>(threadIdx.x) / Shape::kN,
                              w.n_cols / kGroup - 1);  // some group, also where put() wants none
        to.load(w.unit<Block>(first_row, threadIdx.x % Shape::kN, group), threadIdx.x % kPanel,
                group % (kUnit / kGroup));
    }
    template <typename Shape>
    __device__ __forceinline__ void put(__nv_bfloat16* shared, const Fetched& from, int step) const {
        constexpr int kGroups = Shape::kK / kGroup;
        const int i = threadIdx.x / Shape::kN, group = step * kGroups + i;
        if (i >= kGroups || group * kGroup >= w.n_cols) return;
        float x[32];
        from.decode(group % (kUnit / kGroup), x);
        __nv_bfloat16* to = shared + threadIdx.x % Shape::kN * Shape::kLd + i * kGroup;
#pragma unroll
        for (int c = 0; c < 32; c += 8) {
            const uint4 hi = round_eight(x + c);
            *reinterpret_cast<uint4*>(to + c) = hi;
            if constexpr (kTerms == 2) {
                subtract_eight(x + c, hi);
                *reinterpret_cast<uint4*>(to + Shape::kN * Shape::kLd + c) = round_eight(x + c);
            }
        }
    }
};

}  // namespace gemmart::gpu
