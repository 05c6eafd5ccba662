// Formats whose blocks are 256 columns: a unit is one of them. A lane's part:
//
// clang-format off
//   Q2_K     scales and minima [16]: nibbles as in the file | d, dmin f16[2] | groups of: crumbs [8]
//   Q3_K     scales: six bits [2 halves] u32, [2 halves] u16 | d f16 | groups of: crumbs [8] | third bits [4]
//   Q4_K     d, dmin f16[2], scales and minima: six bits [2 halves] u32, [2 halves] u16 | groups of: nibbles [16]
//   Q5_K     as Q4_K | groups of: nibbles [16] | fifth bits [4]
//   Q6_K     scales + 128 [16] | d f16 | groups of: nibbles [16] | crumbs [8]
//   IQ4_XS   d f16, scales: six bits u16, u32 | groups of: nibbles [16], in order
// clang-format on
//
// Six bits: eight numbers in 48 bits, number i from bit 6i on; of Q3_K those of 16 columns each, of Q4_K and Q5_K scale
// and minimum of 32 columns each.
#pragma once

#include "cuda/packed_simple.cuh"

namespace gemmart::gpu {

struct SixBits {
    uint32_t word, half;  // 32 bits, then 16; those above them may be anything
};
// Four numbers.
static __device__ __forceinline__ uint32_t six_bits(const SixBits& from, bool upper) {
    return upper ? from.word >> 24 | from.half << 8 : from.word;
}
template <typename F>
static __device__ SixBits pack_six_bits(F number) {
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) bits |= static_cast<uint64_t>(number(i)) << 6 * i;
    return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// d, dmin, scales and minima.
struct PackedK {
    static constexpr Kind kKind = Kind::Integers;
    static constexpr int kBias = 0, kParts = 1;
    static constexpr bool kOffset = true;
    struct Head {
        uint4 all;
    };
    static __device__ __forceinline__ Head load_head(const std::byte* unit, int lane, int) {
        return {load_plane<uint4>(unit, 0, lane)};
    }
    static __device__ __forceinline__ void scales(const Head& head, int first, int i, float* scale, float* offset) {
        const SixBits half = {first < 4 ? head.all.y : head.all.z, first < 4 ? head.all.w : head.all.w >> 16};
        const uint32_t bits = six_bits(half, (first + i) % 4 >= 2) >> 12 * (i % 2);
        scale[0] = times_small(low_half(head.all.x), bits & 63);
        offset[0] = times_small(high_half(head.all.x), bits >> 6 & 63);
    }
    template <typename Block>
    static __device__ void store_head(const Block& b, std::byte* unit, int lane) {
        SixBits halves[2];
        for (int h = 0; h < 2; ++h)
            halves[h] = pack_six_bits([&](int i) {
                const int g = 4 * h + i / 2;
                return static_cast<uint32_t>(i % 2 ? q4_k_min(b.scales, g) : q4_k_scale(b.scales, g));
            });
        const uint32_t d = b.d | static_cast<uint32_t>(b.dmin) << 16;
        store_plane(unit, 0, lane, uint4{d, halves[0].word, halves[1].word, halves[0].half | halves[1].half << 16});
    }
    // Of weights 32 g + k: Q4_K and Q5_K keep four bits in the same way.
    static __device__ __forceinline__ uint32_t low(const uint8_t* qs, int g, int k) {
        return qs[32 * (g / 2) + k] >> 4 * (g % 2) & 15;
    }
};

template <>
struct Packed<BlockQ4_K> : PackedK {
    static constexpr int kTurn = 4, kLaneBytes = sizeof(BlockQ4_K);
    struct Codes {
        uint4 low;
    };
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        return {load_plane<uint4>(unit, 16 + 16 * g, lane)};
    }
    static __device__ __forceinline__ void unpack(const Codes& from, unsigned (&codes)[8]) {
        unpack_nibbles(from.low, codes);
    }
    static __device__ void pack(const BlockQ4_K* blocks, int n, std::byte* unit, int lane) {
        const BlockQ4_K b = n ? *blocks : BlockQ4_K{};
        store_head(b, unit, lane);
        for (int g = 0; g < 8; ++g)
            store_plane(unit, 16 + 16 * g, lane, nibbles([&](int k) { return low(b.qs, g, k); }));
    }
};

template <>
struct Packed<BlockQ5_K> : PackedK {
    static constexpr int kTurn = 2, kLaneBytes = sizeof(BlockQ5_K);
    struct Codes {
        uint4 low;
        uint32_t high;
    };
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        return {load_plane<uint4>(unit, 16 + 20 * g, lane), load_plane<uint32_t>(unit, 32 + 20 * g, lane)};
    }
    static __device__ __forceinline__ void unpack(const Codes& from, unsigned (&codes)[8]) {
        unpack_nibbles(from.low, codes);
        add_bits<4>(from.high, codes);
    }
    static __device__ void pack(const BlockQ5_K* blocks, int n, std::byte* unit, int lane) {
        const BlockQ5_K b = n ? *blocks : BlockQ5_K{};
        store_head(b, unit, lane);
        for (int g = 0; g < 8; ++g) {
            store_plane(unit, 16 + 20 * g, lane, nibbles([&](int k) { return low(b.qs, g, k); }));
            store_plane(unit, 32 + 20 * g, lane,
                        single_bits([&](int k) { return static_cast<uint32_t>(b.qh[k] >> g & 1); }));
        }
    }
};

template <>
struct Packed<BlockQ2_K> {
    static constexpr Kind kKind = Kind::Integers;
    static constexpr int kBias = 0, kParts = 2, kTurn = 4, kLaneBytes = sizeof(BlockQ2_K);
    static constexpr bool kOffset = true;
    struct Head {
        uint2 both;
        uint32_t d;
    };
    struct Codes {
        uint2 low;
    };
    static __device__ __forceinline__ Head load_head(const std::byte* unit, int lane, int first) {
        return {reinterpret_cast<const uint2*>(unit)[2 * lane + first / 4], load_plane<uint32_t>(unit, 16, lane)};
    }
    static __device__ __forceinline__ void scales(const Head& head, int, int i, float* scale, float* offset) {
        const uint32_t word = (i < 2 ? head.both.x : head.both.y) >> 16 * (i % 2);
        const float d = low_half(head.d), dmin = high_half(head.d);
        for (int part = 0; part < 2; ++part) {
            scale[part] = times_small(d, word >> 8 * part & 15);
            offset[part] = times_small(dmin, word >> (8 * part + 4) & 15);
        }
    }
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        return {load_plane<uint2>(unit, 20 + 8 * g, lane)};
    }
    static __device__ __forceinline__ void unpack(const Codes& from, unsigned (&codes)[8]) {
        for (unsigned& code : codes) code = 0;
        add_crumbs<0>(from.low, codes);
    }
    static __device__ void pack(const BlockQ2_K* blocks, int n, std::byte* unit, int lane) {
        const BlockQ2_K b = n ? *blocks : BlockQ2_K{};
        uint4 both;
        memcpy(&both, b.scales, sizeof both);
        store_plane(unit, 0, lane, both);
        store_plane(unit, 16, lane, b.d | static_cast<uint32_t>(b.dmin) << 16);
        for (int g = 0; g < 8; ++g)
            store_plane(unit, 20 + 8 * g, lane, crumbs([&](int k) {
                            return static_cast<uint32_t>(b.qs[32 * (g / 4) + k] >> 2 * (g % 4) & 3);
                        }));
    }
};

template <>
struct Packed<BlockQ3_K> {
    static constexpr Kind kKind = Kind::Integers;
    static constexpr int kBias = 4, kParts = 2, kTurn = 4, kLaneBytes = sizeof(BlockQ3_K);
    static constexpr bool kOffset = false;
    struct Head {
        SixBits bits;
        uint32_t d;
    };
    struct Codes {
        uint2 low;
        uint32_t high;
    };
    static __device__ __forceinline__ Head load_head(const std::byte* unit, int lane, int first) {
        const int half = first / 4;
        return {{load_plane<uint32_t>(unit, 4 * half, lane), load_plane<uint16_t>(unit, 8 + 2 * half, lane)},
                load_plane<uint16_t>(unit, 12, lane)};
    }
    static __device__ __forceinline__ void scales(const Head& head, int, int i, float* scale, float*) {
        const float d = low_half(head.d);
        const uint32_t bits = six_bits(head.bits, i >= 2) >> 12 * (i % 2);
        for (int part = 0; part < 2; ++part) scale[part] = d * small_float(bits >> 6 * part & 63, 32);
    }
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        return {load_plane<uint2>(unit, 14 + 12 * g, lane), load_plane<uint32_t>(unit, 22 + 12 * g, lane)};
    }
    static __device__ __forceinline__ void unpack(const Codes& from, unsigned (&codes)[8]) {
        for (unsigned& code : codes) code = 0;
        add_crumbs<0>(from.low, codes);
        add_bits<2>(from.high, codes);
    }
    static __device__ void pack(const BlockQ3_K* blocks, int n, std::byte* unit, int lane) {
        const BlockQ3_K b = n ? *blocks : BlockQ3_K{};
        for (int h = 0; h < 2; ++h) {
            const SixBits bits =
                pack_six_bits([&](int i) { return static_cast<uint32_t>(q3_k_scale(b.scales, 8 * h + i) + 32); });
            store_plane(unit, 4 * h, lane, bits.word);
            store_plane(unit, 8 + 2 * h, lane, static_cast<uint16_t>(bits.half));
        }
        store_plane(unit, 12, lane, b.d);
        for (int g = 0; g < 8; ++g) {
            store_plane(unit, 14 + 12 * g, lane, crumbs([&](int k) {
                            return static_cast<uint32_t>(b.qs[32 * (g / 4) + k] >> 2 * (g % 4) & 3);
                        }));
            store_plane(unit, 22 + 12 * g, lane,
                        single_bits([&](int k) { return static_cast<uint32_t>(b.hmask[k] >> g & 1); }));
        }
    }
};

template <>
struct Packed<BlockQ6_K> {
    static constexpr Kind kKind = Kind::Integers;
    static constexpr int kBias = 32, kParts = 2, kTurn = 2, kLaneBytes = sizeof(BlockQ6_K);
    static constexpr bool kOffset = false;
    struct Head {
        uint32_t scales, d;
    };
    struct Codes {
        uint4 low;
        uint2 high;
    };
    static __device__ __forceinline__ Head load_head(const std::byte* unit, int lane, int first) {
        return {reinterpret_cast<const uint32_t*>(unit)[4 * lane + first / 2], load_plane<uint16_t>(unit, 16, lane)};
    }
    static __device__ __forceinline__ void scales(const Head& head, int, int i, float* scale, float*) {
        const uint32_t word = head.scales >> 16 * i;
        const float d = low_half(head.d);
        for (int part = 0; part < 2; ++part) scale[part] = d * small_float(word >> 8 * part & 255, 128);
    }
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        return {load_plane<uint4>(unit, 18 + 24 * g, lane), load_plane<uint2>(unit, 34 + 24 * g, lane)};
    }
    static __device__ __forceinline__ void unpack(const Codes& from, unsigned (&codes)[8]) {
        unpack_nibbles(from.low, codes);
        add_crumbs<4>(from.high, codes);
    }
    static __device__ void pack(const BlockQ6_K* blocks, int n, std::byte* unit, int lane) {
        const BlockQ6_K b = n ? *blocks : BlockQ6_K{};
        uint32_t scales[4] = {};
        for (int i = 0; i < 16; ++i) scales[i / 4] |= static_cast<uint32_t>(b.scales[i] + 128) << 8 * (i % 4);
        store_plane(unit, 0, lane, uint4{scales[0], scales[1], scales[2], scales[3]});
        store_plane(unit, 16, lane, b.d);
        for (int g = 0; g < 8; ++g) {
            const int h = g / 4, j = g % 4;
            store_plane(unit, 18 + 24 * g, lane, nibbles([&](int k) {
                            return static_cast<uint32_t>(b.ql[64 * h + 32 * (j % 2) + k] >> 4 * (j / 2) & 15);
                        }));
            store_plane(unit, 34 + 24 * g, lane,
                        crumbs([&](int k) { return static_cast<uint32_t>(b.qh[32 * h + k] >> 2 * j & 3); }));
        }
    }
};

template <>
struct Packed<BlockIQ4_XS> {
    static constexpr Kind kKind = Kind::Integers;
    static constexpr int kBias = 0, kParts = 1, kTurn = 4, kLaneBytes = sizeof(BlockIQ4_XS);
    static constexpr bool kOffset = false;
    struct Head {
        uint2 all;
    };
    struct Codes {
        uint4 levels;
    };
    static __device__ __forceinline__ Head load_head(const std::byte* unit, int lane, int) {
        return {load_plane<uint2>(unit, 0, lane)};
    }
    static __device__ __forceinline__ void scales(const Head& head, int first, int i, float* scale, float*) {
        const uint32_t bits = six_bits({head.all.y, head.all.x >> 16}, first >= 4);
        scale[0] = low_half(head.all.x) * small_float(bits >> 6 * i & 63, 32);
    }
    static __device__ __forceinline__ Codes load_codes(const std::byte* unit, int lane, int g) {
        return {load_plane<uint4>(unit, 8 + 16 * g, lane)};
    }
    static __device__ __forceinline__ void unpack(const Codes& from, unsigned (&codes)[8]) {
        unpack_levels(from.levels, kIQ4Words, codes);
    }
    static __device__ void pack(const BlockIQ4_XS* blocks, int n, std::byte* unit, int lane) {
        const BlockIQ4_XS b = n ? *blocks : BlockIQ4_XS{};
        const SixBits bits = pack_six_bits([&](int g) { return static_cast<uint32_t>(iq4_xs_scale(b, g) + 32); });
        store_plane(unit, 0, lane, uint2{b.d | bits.half << 16, bits.word});
        for (int g = 0; g < 8; ++g)
            store_plane(unit, 8 + 16 * g, lane, ordered_nibbles([&](int k) { return level_of(b.qs + 16 * g, k); }));
    }
};

}  // namespace gemmart::gpu
