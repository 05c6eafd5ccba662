// Where the products of matmul_x86.h take weights from, over its vector type V: the packed blocks of each format
// (layout.h), unpacked in registers. Formats whose blocks are unpacked to memory first are in matmul_unpacked.h.
#pragma once

#include <immintrin.h>

#include <utility>

#include "cpu/tables.h"
#include "formats/iq4_nl.h"

#define GEMMART_INLINE __attribute__((always_inline)) inline

namespace gemmart::cpu {
namespace {

using Bytes = const uint8_t*;

template <int I>
struct Index {
    static constexpr int value = I;
};

// f(Index<0>) … f(Index<N - 1>): the indexes are constants, so that arrays of vectors stay in registers.
template <int N, typename F>
GEMMART_INLINE void unroll(F f) {
    [&]<int... I>(std::integer_sequence<int, I...>)
        __attribute__((always_inline)) { (f(Index<I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

// ---- Sources of integer weights. A block has kColumns columns; its groups come in turns of kTurn, because the place
// of a group's bits depends on g % kTurn. `lane` is the tile's first row in the panel. kParts: scales a group.

template <typename V, int N>
struct Scales {  // weight = scale · (u − kBias) − offset, the last only where kOffset
    typename V::F scale[N], offset[N];
};

// As floats: four bits from bit Low of lo, above them two from bit High of hi.
template <typename V, int Low, int High>
GEMMART_INLINE typename V::F six_bits(Bytes lo, Bytes hi) {
    const __m128i low = _mm_and_si128(_mm_srli_epi16(V::lane_bytes(lo), Low), _mm_set1_epi8(15));
    const __m128i high = V::lane_bytes(hi);
    const __m128i at_four = High >= 4 ? _mm_srli_epi16(high, High - 4) : _mm_slli_epi16(high, 4 - High);
    return V::from_u8(_mm_or_si128(low, _mm_and_si128(at_four, _mm_set1_epi8(48))));
}

template <typename V>
struct Q4_0 {
    static constexpr int kColumns = 32, kTurn = 1, kParts = 1, kBits = 4, kBytes = 288, kBias = 8;
    static constexpr bool kOffset = false;
    template <int, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int, int lane) {
        const auto v = V::load_bytes(p + 32 + S % 4 * 64 + 4 * lane);
        return S < 4 ? V::low_nibble(v) : V::high_nibble(v);
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 1>& out) { out.scale[0] = V::halves(p + 2 * lane); }
};

template <typename V>
struct Q4_1 {
    static constexpr int kColumns = 32, kTurn = 1, kParts = 1, kBits = 4, kBytes = 320, kBias = 0;
    static constexpr bool kOffset = true;
    template <int, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        return Q4_0<V>::template slot<0, S>(p + 32, g, lane);
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 1>& out) {
        out.scale[0] = V::halves(p + 2 * lane);
        out.offset[0] = V::mul(V::set(-1), V::halves(p + 32 + 2 * lane));
    }
};

template <typename V>
struct Q5_0 {
    static constexpr int kColumns = 32, kTurn = 1, kParts = 1, kBits = 5, kBytes = 352, kBias = 16;
    static constexpr bool kOffset = false;
    template <int, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        return V::template with_bit<4>(Q4_0<V>::template slot<0, S>(p + 64, g, lane), p + 32 + 8 * S + lane / 2);
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 1>& out) { out.scale[0] = V::halves(p + 2 * lane); }
};

template <typename V>
struct Q5_1 {
    static constexpr int kColumns = 32, kTurn = 1, kParts = 1, kBits = 5, kBytes = 384, kBias = 0;
    static constexpr bool kOffset = true;
    template <int, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        return Q5_0<V>::template slot<0, S>(p + 32, g, lane);
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 1>& out) { Q4_1<V>::scales(p, lane, out); }
};

template <typename V>
struct Q8_0 {
    static constexpr int kColumns = 32, kTurn = 1, kParts = 1, kBits = 8, kBytes = 544, kBias = V::kSignedBias;
    static constexpr bool kOffset = false;
    template <int, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int, int lane) {
        return V::signed_bytes(V::load_bytes(p + 32 + 64 * S + 4 * lane));
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 1>& out) { out.scale[0] = V::halves(p + 2 * lane); }
};

template <typename V>
struct IQ4_NL {
    static constexpr int kColumns = 32, kTurn = 1, kParts = 1, kBits = 8, kBytes = 288, kBias = V::kSignedBias;
    static constexpr bool kOffset = false;
    template <int, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        return V::signed_bytes(V::look_up(kIQ4Levels, Q4_0<V>::template slot<0, S>(p, g, lane)));
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 1>& out) { Q8_0<V>::scales(p, lane, out); }
};

template <typename V>
struct Q2_K {
    static constexpr int kColumns = 256, kTurn = 4, kParts = 2, kBits = 4, kBytes = 1344, kBias = 0;
    static constexpr bool kOffset = true;
    template <int J, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        return V::template two_bits<J>(V::load_bytes(p + 320 + g / 4 * 512 + S * 64 + 4 * lane));
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 16>& out) {
        const auto d = V::halves(p + 2 * lane), dmin = V::halves(p + 32 + 2 * lane);
        const __m128i nibble = _mm_set1_epi8(15);
        for (int i = 0; i < 16; ++i) {
            const __m128i both = V::lane_bytes(p + 64 + i * kPanel + lane);
            out.scale[i] = V::mul(d, V::from_u8(_mm_and_si128(both, nibble)));
            out.offset[i] = V::mul(dmin, V::from_u8(_mm_and_si128(_mm_srli_epi16(both, 4), nibble)));
        }
    }
};

template <typename V>
struct Q3_K {
    static constexpr int kColumns = 256, kTurn = 4, kParts = 2, kBits = 4, kBytes = 1760, kBias = 4;
    static constexpr bool kOffset = false;
    template <int J, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        const Bytes half = p + 224 + g / 4 * 768;
        return V::template with_bit<2>(V::template two_bits<J>(V::load_bytes(half + 256 + S * 64 + 4 * lane)),
                                       half + (8 * J + S) * 8 + lane / 2);
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 16>& out) {
        const auto d = V::halves(p + 2 * lane);
        unroll<16>([&](auto index) __attribute__((always_inline)) {
            constexpr int i = decltype(index)::value;
            const auto six =
                six_bits<V, 4 * (i / 8), 2 * (i / 4)>(p + 32 + i % 8 * kPanel + lane, p + 160 + i % 4 * kPanel + lane);
            out.scale[i] = V::mul(d, V::add(six, V::set(-32)));
        });
    }
};

template <typename V>
struct Q4_K {
    static constexpr int kColumns = 256, kTurn = 2, kParts = 1, kBits = 4, kBytes = 2304, kBias = 0;
    static constexpr bool kOffset = true;
    template <int J, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        const auto v = V::load_bytes(p + 256 + g / 2 * 512 + S * 64 + 4 * lane);
        return J ? V::high_nibble(v) : V::low_nibble(v);
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 8>& out) {
        const auto d = V::halves(p + 2 * lane), dmin = V::halves(p + 32 + 2 * lane);
        unroll<8>([&](auto i) __attribute__((always_inline)) {
            constexpr int g = decltype(i)::value, kLow = 4 * (g & 1), kHigh = 2 * (g % 4);
            const Bytes lo = p + 64 + g / 2 * kPanel + lane, hi = p + 192 + g / 4 * kPanel + lane;
            out.scale[g] = V::mul(d, six_bits<V, kLow, kHigh>(lo, hi));
            out.offset[g] = V::mul(dmin, six_bits<V, kLow, kHigh>(lo + 64, hi + 32));
        });
    }
};

template <typename V>
struct Q5_K {
    static constexpr int kColumns = 256, kTurn = 2, kParts = 1, kBits = 5, kBytes = 2816, kBias = 0;
    static constexpr bool kOffset = true;
    template <int J, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        const Bytes pair = p + 256 + g / 2 * 640;
        const auto v = V::load_bytes(pair + 128 + S * 64 + 4 * lane);
        return V::template with_bit<4>(J ? V::high_nibble(v) : V::low_nibble(v), pair + (8 * J + S) * 8 + lane / 2);
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 8>& out) { Q4_K<V>::scales(p, lane, out); }
};

template <typename V>
struct IQ4_XS {
    static constexpr int kColumns = 256, kTurn = 1, kParts = 1, kBits = 8, kBytes = 2176, kBias = V::kSignedBias;
    static constexpr bool kOffset = false;
    template <int, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        return IQ4_NL<V>::template slot<0, S>(p + 96 + g * 256, 0, lane);  // as if d stood before each group
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 8>& out) {
        const auto d = V::halves(p + 2 * lane);
        unroll<8>([&](auto i) __attribute__((always_inline)) {
            constexpr int g = decltype(i)::value;
            const auto six =
                six_bits<V, 4 * (g & 1), 2 * (g % 4)>(p + 32 + g / 2 * kPanel + lane, p + 96 + g / 4 * kPanel + lane);
            out.scale[g] = V::mul(d, V::add(six, V::set(-32)));
        });
    }
};

template <typename V>
struct Q6_K {
    static constexpr int kColumns = 256, kTurn = 4, kParts = 2, kBits = 6, kBytes = 3360, kBias = 32;
    static constexpr bool kOffset = false;
    template <int J, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        const Bytes half = p + 288 + g / 4 * 1536 + 4 * lane;
        const auto v = V::load_bytes(half + (J & 1 ? 1024 + S * 64 : S * 128));
        const auto high = V::load_bytes(half + S * 128 + 64);
        return V::template with_bits45<J>(J >> 1 ? V::high_nibble(v) : V::low_nibble(v), high);
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 16>& out) {
        const auto d = V::halves(p + 2 * lane);
        for (int i = 0; i < 16; ++i) {
            out.scale[i] = V::mul(d, V::from_s8(V::lane_bytes(p + 32 + i * kPanel + lane)));
        }
    }
};

template <typename V>
struct TQ2_0 {
    static constexpr int kColumns = 256, kTurn = 4, kParts = 1, kBits = 4, kBytes = 1056, kBias = 1;
    static constexpr bool kOffset = false;
    template <int J, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        return V::template two_bits<J>(V::load_bytes(p + 32 + g / 4 * 512 + S * 64 + 4 * lane));
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 8>& out) {
        const auto d = V::halves(p + 2 * lane);
        for (int g = 0; g < 8; ++g) out.scale[g] = d;
    }
};

template <typename V>
struct MXFP4 {
    static constexpr int kColumns = 32, kTurn = 1, kParts = 1, kBits = 5, kBytes = 272, kBias = 16;
    static constexpr bool kOffset = false;
    template <int, int S>
    static GEMMART_INLINE typename V::B slot(Bytes p, int g, int lane) {
        static constexpr int8_t kLevels[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};  // + 16
        return V::look_up(kLevels, Q4_0<V>::template slot<0, S>(p - 16, g, lane));
    }
    static GEMMART_INLINE void scales(Bytes p, int lane, Scales<V, 1>& out) {
        out.scale[0] = V::powers(V::lane_bytes(p + lane));
    }
};

// ---- Sources of float weights: load<K % 2>(panel, k) is column k.

template <typename V>
struct F32 {
    template <int>
    static GEMMART_INLINE typename V::F load(Bytes p, int k, int lane) {
        return V::load(reinterpret_cast<const float*>(p) + k * kPanel + lane);
    }
};

template <typename V>
struct F16 {
    template <int>
    static GEMMART_INLINE typename V::F load(Bytes p, int k, int lane) {
        return V::halves(p + (k * kPanel + lane) * 2);
    }
};

template <typename V>
struct BF16 {
    template <int Odd>
    static GEMMART_INLINE typename V::F load(Bytes p, int k, int lane) {
        return V::template bfloat16<Odd>(V::load_bytes(p + (k / 2 * kPanel + lane) * 4));
    }
};

}  // namespace
}  // namespace gemmart::cpu
