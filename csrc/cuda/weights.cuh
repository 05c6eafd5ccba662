// Weights on the device. A matrix is a sequence of panels of 32 rows, a panel a sequence of units of 256 columns; the
// last panel and the last unit are filled up with zeros. Lane = row: nothing is summed across lanes, and what all lanes
// load at once stands together. A unit is a permutation of the bits that its rows have in the file.
//
// A unit is a sequence of planes [32 lanes][n bytes], first those that all its groups of 32 columns share (its HEAD:
// scales and minima), then, group by group, those of the weights' CODES. packed_*.cuh draw each format's planes as they
// lie in one lane. Formats that have no such layout keep their blocks as in the file: [blocks of a unit][32 lanes].
#pragma once

#include "cuda/packed_blocks.cuh"
#include "cuda/packed_floats.cuh"
#include "cuda/packed_k.cuh"
#include "cuda/packed_simple.cuh"

namespace gemmart::gpu {

template <typename T>
struct Type {
    using type = T;
};
// f(Type<Block>()) with the block of a format.
template <typename F>
auto with_block(DType dtype, F f) {
    switch (dtype) {
#define FORMAT(name, id, Block) \
    case DType::name:           \
        return f(Type<Block>());
#include "formats/formats.def"
#undef FORMAT
    }
    throw std::invalid_argument("no such format");
}

inline int units_of(int n_cols) { return (n_cols + kUnit - 1) / kUnit; }

// Where a unit begins; `n_units`: of a panel.
template <typename Block>
static __device__ __forceinline__ const std::byte* unit_at(const std::byte* data, int n_units, int panel, int unit) {
    return data + (static_cast<size_t>(panel) * n_units + unit) * (kPanel * Packed<Block>::kLaneBytes);
}

// The weights of row `lane` of a panel in group g (0 … 7) of a unit.
template <typename Block>
static __device__ __forceinline__ void decode32(const std::byte* unit, int lane, int g, float (&out)[32]) {
    using P = Packed<Block>;
    if constexpr (P::kKind == Kind::Integers) {
        const int first = g / P::kTurn * P::kTurn;
        unsigned codes[8];
        float scale[2], offset[2];
        P::unpack(P::load_codes(unit, lane, g), codes);
        P::scales(P::load_head(unit, lane, first), first, g - first, scale, offset);
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int code = static_cast<int8_t>(codes[i / 4] >> 8 * (i % 4)), part = P::kParts * i / 32;
            out[i] = scale[part] * static_cast<float>(code - P::kBias);
            if constexpr (P::kOffset) out[i] -= offset[part];
        }
    } else if constexpr (P::kKind == Kind::Floats) {
        P::unpack(P::load_codes(unit, lane, g), out);
    } else {
        float block[Block::kSize];
        decode(P::block(unit, lane, g * 32 / Block::kSize), block);
        for (int i = 0; i < 32; ++i) out[i] = block[g * 32 % Block::kSize + i];
    }
}

}  // namespace gemmart::gpu
