// F16, BF16, F32: a group is pieces of 16 bytes, each a plane of 8 or 4 columns.
#pragma once

#include "cuda/packed.cuh"

namespace gemmart::gpu {

template <typename Block>
struct PackedFloats {
    static constexpr Kind kKind = Kind::Floats;
    static constexpr int kLaneBytes = kUnit * static_cast<int>(sizeof(Block));
    static constexpr int kColumns = 16 / sizeof(Block), kPieces = 32 / kColumns;  // of a piece, of a group
    static constexpr int kTurn = 1;

    struct Codes {
        uint4 pieces[kPieces];
    };
    static __device__ __forceinline__ uint4 load_piece(const std::byte* unit, int lane, int g, int i) {
        return load_plane<uint4>(unit, 16 * (kPieces * g + i), lane);
    }
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        Codes codes;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) codes.pieces[i] = load_piece(unit, lane, g, i);
        return codes;
    }
    static __device__ __forceinline__ void unpack(const Codes& from, float (&out)[32]) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            float piece[kColumns];
            Packed<Block>::unpack_piece(from.pieces[i], piece);
#pragma unroll
            for (int k = 0; k < kColumns; ++k) out[kColumns * i + k] = piece[k];
        }
    }
    static __device__ void pack(const Block* numbers, int n, std::byte* unit, int lane) {
        for (int i = 0; i < 8 * kPieces; ++i) {
            uint4 piece = {};
            if (i * kColumns < n) memcpy(&piece, numbers + i * kColumns, sizeof piece);
            store_plane(unit, 16 * i, lane, piece);
        }
    }
};

template <>
struct Packed<BlockF32> : PackedFloats<BlockF32> {
    static __device__ __forceinline__ void unpack_piece(const uint4& from, float (&out)[kColumns]) {
        out[0] = float_from_bits(from.x), out[1] = float_from_bits(from.y);
        out[2] = float_from_bits(from.z), out[3] = float_from_bits(from.w);
    }
};

template <typename T>
static __device__ __forceinline__ void unpack_pairs(const uint4& from, float (&out)[8]) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = pair_to_floats<T>(words[i]);
        out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
}

template <>
struct Packed<BlockF16> : PackedFloats<BlockF16> {
    static __device__ __forceinline__ void unpack_piece(const uint4& from, float (&out)[kColumns]) {
        unpack_pairs<__half>(from, out);
    }
};

template <>
struct Packed<BlockBF16> : PackedFloats<BlockBF16> {
    static __device__ __forceinline__ void unpack_piece(const uint4& from, float (&out)[kColumns]) {
        unpack_pairs<__nv_bfloat16>(from, out);
    }
};

}  // namespace gemmart::gpu
