// Formats whose blocks are 32 columns: a unit is eight of them. A lane's part:
//
//   Q4_0, IQ4_NL   d f16[8] | groups of: nibbles [16], of IQ4_NL in order
//   Q4_1           d f16[8] | m f16[8] | groups of: nibbles [16]
//   Q5_0           d f16[8] | groups of: nibbles [16] | fifth bits [4]
//   Q5_1           d f16[8] | m f16[8] | groups as Q5_0
//   Q8_0           d f16[8] | groups of: int8 [2 planes][16]
//   MXFP4          e [8]    | groups of: nibbles [16], in order
#pragma once

#include <type_traits>

#include "cuda/packed.cuh"

namespace gemmart::gpu {

// The k-th half.
static __device__ __forceinline__ float half_of(uint32_t halves, int k) { return low_half(halves >> 16 * k); }
static __device__ __forceinline__ float half_of(const uint2& halves, int k) {
    return half_of(k < 2 ? halves.x : halves.y, k % 2);
}

// d, and m where kOffset: [8] halves each in front of the groups.
template <typename Block, bool kOffsets, int kTurnOf>
struct PackedHalves {
    static constexpr Kind kKind = Kind::Integers;
    static constexpr int kParts = 1, kTurn = kTurnOf, kLaneBytes = 8 * static_cast<int>(sizeof(Block));
    static constexpr bool kOffset = kOffsets;
    static constexpr int kHeadBytes = kOffset ? 32 : 16;

    using Halves = std::conditional_t<kTurn == 4, uint2, uint32_t>;  // of a turn
    struct Head {
        Halves d, m = {};
    };
    static __device__ __forceinline__ Halves load_halves(const std::byte* unit, int offset, int lane, int first) {
        return reinterpret_cast<const Halves*>(unit + kPanel * offset)[(8 * lane + first) / kTurn];
    }
    static __device__ __forceinline__ Head load_head(const std::byte* unit, int lane, int first) {
        Head head;
        head.d = load_halves(unit, 0, lane, first);
        if constexpr (kOffset) head.m = load_halves(unit, 16, lane, first);
        return head;
    }
    static __device__ __forceinline__ void scales(const Head& head, int, int i, float* scale, float* offset) {
        scale[0] = half_of(head.d, i);
        if constexpr (kOffset) offset[0] = -half_of(head.m, i);
    }
    // [8] halves; get(i): of the i-th block.
    template <typename F>
    static __device__ void store_halves(std::byte* unit, int offset, int lane, int n, F get) {
        uint32_t words[4] = {};
        for (int i = 0; i < n; ++i) words[i / 2] |= static_cast<uint32_t>(get(i)) << 16 * (i % 2);
        store_plane(unit, offset, lane, uint4{words[0], words[1], words[2], words[3]});
    }
    static __device__ void store_head(const Block* blocks, int n, std::byte* unit, int lane) {
        store_halves(unit, 0, lane, n, [&](int i) { return blocks[i].d; });
        if constexpr (kOffset) store_halves(unit, 16, lane, n, [&](int i) { return blocks[i].m; });
    }
};

// Nibbles as in the file.
static __device__ __forceinline__ uint4 nibbles_of(const uint8_t* qs) {
    uint4 out;
    memcpy(&out, qs, sizeof out);
    return out;
}

template <typename Block, int kBiasOf, bool kOffsets>
struct PackedFourBits : PackedHalves<Block, kOffsets, 4> {
    using Base = PackedHalves<Block, kOffsets, 4>;
    static constexpr int kBias = kBiasOf;
    struct Codes {
        uint4 low;
    };
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        return {load_plane<uint4>(unit, Base::kHeadBytes + 16 * g, lane)};
    }
    static __device__ __forceinline__ void unpack(const Codes& from, unsigned (&codes)[8]) {
        unpack_nibbles(from.low, codes);
    }
    static __device__ void pack(const Block* blocks, int n, std::byte* unit, int lane) {
        Base::store_head(blocks, n, unit, lane);
        for (int g = 0; g < 8; ++g)
            store_plane(unit, Base::kHeadBytes + 16 * g, lane, g < n ? nibbles_of(blocks[g].qs) : uint4{});
    }
};

template <>
struct Packed<BlockQ4_0> : PackedFourBits<BlockQ4_0, 8, false> {};
template <>
struct Packed<BlockQ4_1> : PackedFourBits<BlockQ4_1, 0, true> {};

template <typename Block, int kBiasOf, bool kOffsets>
struct PackedFiveBits : PackedHalves<Block, kOffsets, 2> {
    using Base = PackedHalves<Block, kOffsets, 2>;
    static constexpr int kBias = kBiasOf;
    struct Codes {
        uint4 low;
        uint32_t high;
    };
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        const int at = Base::kHeadBytes + 20 * g;
        return {load_plane<uint4>(unit, at, lane), load_plane<uint32_t>(unit, at + 16, lane)};
    }
    static __device__ __forceinline__ void unpack(const Codes& from, unsigned (&codes)[8]) {
        unpack_nibbles(from.low, codes);
        add_bits<4>(from.high, codes);
    }
    static __device__ void pack(const Block* blocks, int n, std::byte* unit, int lane) {
        Base::store_head(blocks, n, unit, lane);
        for (int g = 0; g < 8; ++g) {
            const int at = Base::kHeadBytes + 20 * g;
            const uint32_t high = g < n ? blocks[g].qh : 0;
            store_plane(unit, at, lane, g < n ? nibbles_of(blocks[g].qs) : uint4{});
            store_plane(unit, at + 16, lane, single_bits([&](int k) { return high >> k & 1; }));
        }
    }
};

template <>
struct Packed<BlockQ5_0> : PackedFiveBits<BlockQ5_0, 16, false> {};
template <>
struct Packed<BlockQ5_1> : PackedFiveBits<BlockQ5_1, 0, true> {};

template <>
struct Packed<BlockQ8_0> : PackedHalves<BlockQ8_0, false, 2> {
    static constexpr int kBias = 0;
    struct Codes {
        uint4 first, second;
    };
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        const int at = kHeadBytes + 32 * g;
        return {load_plane<uint4>(unit, at, lane), load_plane<uint4>(unit, at + 16, lane)};
    }
    static __device__ __forceinline__ void unpack(const Codes& from, unsigned (&codes)[8]) {
        codes[0] = from.first.x, codes[1] = from.first.y, codes[2] = from.first.z, codes[3] = from.first.w;
        codes[4] = from.second.x, codes[5] = from.second.y, codes[6] = from.second.z, codes[7] = from.second.w;
    }
    static __device__ void pack(const BlockQ8_0* blocks, int n, std::byte* unit, int lane) {
        store_head(blocks, n, unit, lane);
        for (int g = 0; g < 8; ++g)
            for (int i = 0; i < 2; ++i) {
                uint4 piece = {};
                if (g < n) memcpy(&piece, blocks[g].qs + 16 * i, sizeof piece);
                store_plane(unit, kHeadBytes + 32 * g + 16 * i, lane, piece);
            }
    }
};

// kIQ4Levels and kMXFP4Levels of formats/, which device code cannot read at compile time.
static constexpr Levels kIQ4Words = {{0xbfad9881, 0xf6eaddcf, 0x26190d01, 0x71594535}};
static constexpr Levels kMXFP4Words = {{0x03020100, 0x0c080604, 0xfdfeff00, 0xf4f8fafc}};

// The number of column k's level in a block of 32.
static __device__ __forceinline__ uint32_t level_of(const uint8_t* qs, int k) {
    return k < 16 ? qs[k] & 15 : qs[k - 16] >> 4;
}

template <>
struct Packed<BlockIQ4_NL> : PackedHalves<BlockIQ4_NL, false, 4> {
    static constexpr int kBias = 0;
    struct Codes {
        uint4 levels;
    };
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        return {load_plane<uint4>(unit, kHeadBytes + 16 * g, lane)};
    }
    static __device__ __forceinline__ void unpack(const Codes& from, unsigned (&codes)[8]) {
        unpack_levels(from.levels, kIQ4Words, codes);
    }
    static __device__ void pack(const BlockIQ4_NL* blocks, int n, std::byte* unit, int lane) {
        store_head(blocks, n, unit, lane);
        for (int g = 0; g < 8; ++g)
            store_plane(unit, kHeadBytes + 16 * g, lane,
                        g < n ? ordered_nibbles([&](int k) { return level_of(blocks[g].qs, k); }) : uint4{});
    }
};

template <>
struct Packed<BlockMXFP4> {
    static constexpr Kind kKind = Kind::Integers;
    static constexpr int kBias = 0, kParts = 1, kTurn = 4, kLaneBytes = 8 * sizeof(BlockMXFP4);
    static constexpr bool kOffset = false;
    struct Head {
        uint32_t e;
    };
    struct Codes {
        uint4 levels;
    };
    static __device__ __forceinline__ Head load_head(const std::byte* unit, int lane, int first) {
        return {reinterpret_cast<const uint32_t*>(unit)[2 * lane + first / 4]};
    }
    static __device__ __forceinline__ void scales(const Head& head, int, int i, float* scale, float*) {
        scale[0] = mxfp4_scale(static_cast<uint8_t>(head.e >> 8 * i));
    }
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        return {load_plane<uint4>(unit, 8 + 16 * g, lane)};
    }
    static __device__ __forceinline__ void unpack(const Codes& from, unsigned (&codes)[8]) {
        unpack_levels(from.levels, kMXFP4Words, codes);
    }
    static __device__ void pack(const BlockMXFP4* blocks, int n, std::byte* unit, int lane) {
        uint2 e = {};
        for (int i = 0; i < n; ++i) (i < 4 ? e.x : e.y) |= static_cast<uint32_t>(blocks[i].e) << 8 * (i % 4);
        store_plane(unit, 0, lane, e);
        for (int g = 0; g < 8; ++g)
            store_plane(unit, 8 + 16 * g, lane,
                        g < n ? ordered_nibbles([&](int k) { return level_of(blocks[g].qs, k); }) : uint4{});
    }
};

}  // namespace gemmart::gpu
