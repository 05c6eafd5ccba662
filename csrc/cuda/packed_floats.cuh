// F16, BF16, F32: a group is planes of 16 bytes, 8 or 4 columns each.
#pragma once

#include "cuda/packed.cuh"

namespace gemmart::gpu {

struct PackedFloats {
    static constexpr Kind kKind = Kind::Floats;

    template <int kPieces>
    struct Pieces {
        uint4 pieces[kPieces];
    };
    template <int kPieces>
    static __device__ __forceinline__ Pieces<kPieces> load(const std::byte* unit, int lane, int g) {
        Pieces<kPieces> out;
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
            out.pieces[i] = load_plane<uint4>(unit, (g * kPieces + i) * static_cast<int>(sizeof(uint4)), lane);
        return out;
    }
    // n numbers of a row.
    template <int kPieces, typename Block>
    static __device__ void store(const Block* numbers, int n, std::byte* unit, int lane) {
        constexpr int kNumbers = sizeof(uint4) / sizeof(Block);
        for (int i = 0; i < kPieces * kUnit / 32; ++i) {
            uint4 piece = {};
            if (i * kNumbers < n) memcpy(&piece, numbers + i * kNumbers, sizeof piece);
            store_plane(unit, i * static_cast<int>(sizeof piece), lane, piece);
        }
    }
};

template <>
struct Packed<BlockF32> : PackedFloats {
    static constexpr int kLaneBytes = 4 * kUnit, kTurn = 1;
    using Codes = Pieces<8>;
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        return load<8>(unit, lane, g);
    }
    static __device__ __forceinline__ void unpack(const Codes& from, float (&out)[32]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            out[4 * i] = float_from_bits(from.pieces[i].x), out[4 * i + 1] = float_from_bits(from.pieces[i].y);
            out[4 * i + 2] = float_from_bits(from.pieces[i].z), out[4 * i + 3] = float_from_bits(from.pieces[i].w);
        }
    }
    static __device__ void pack(const BlockF32* numbers, int n, std::byte* unit, int lane) {
        store<8>(numbers, n, unit, lane);
    }
};

// Two numbers of 16 bits.
struct PackedPairs : PackedFloats {
    static constexpr int kLaneBytes = 2 * kUnit, kTurn = 2;
    using Codes = Pieces<4>;
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        return load<4>(unit, lane, g);
    }
    template <typename Pair>
    static __device__ __forceinline__ void unpack_pairs(const Codes& from, float (&out)[32], Pair pair) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pair(from.pieces[i].x, out + 8 * i), pair(from.pieces[i].y, out + 8 * i + 2);
            pair(from.pieces[i].z, out + 8 * i + 4), pair(from.pieces[i].w, out + 8 * i + 6);
        }
    }
};

template <>
struct Packed<BlockF16> : PackedPairs {
    static __device__ __forceinline__ void unpack(const Codes& from, float (&out)[32]) {
        unpack_pairs(from, out, [](uint32_t bits, float* to) { to[0] = low_half(bits), to[1] = high_half(bits); });
    }
    static __device__ void pack(const BlockF16* numbers, int n, std::byte* unit, int lane) {
        store<4>(numbers, n, unit, lane);
    }
};

template <>
struct Packed<BlockBF16> : PackedPairs {
    static __device__ __forceinline__ void unpack(const Codes& from, float (&out)[32]) {
        unpack_pairs(from, out, [](uint32_t bits, float* to) {
            to[0] = float_from_bits(bits << 16), to[1] = float_from_bits(bits & 0xffff0000);
        });
    }
    static __device__ void pack(const BlockBF16* numbers, int n, std::byte* unit, int lane) {
        store<4>(numbers, n, unit, lane);
    }
};

}  // namespace gemmart::gpu
