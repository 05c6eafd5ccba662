// The vectors of AVX2 for matmul_x86.h: one ymm is a column of half a panel.
#pragma once

#include "cpu/matmul_x86.h"

namespace gemmart::cpu {
namespace {

struct Avx2 {
    static constexpr int kLanes = 8, kTile = 4, kUnpackFrom = 32;
    using F = __m256;
    using B = __m256i;

    static GEMMART_INLINE F set(float x) { return _mm256_set1_ps(x); }
    static GEMMART_INLINE F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
    static GEMMART_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
    static GEMMART_INLINE __m256i first(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static GEMMART_INLINE F load_some(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
    static GEMMART_INLINE void store_some(float* p, F x, int n) { _mm256_maskstore_ps(p, first(n), x); }
    static GEMMART_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static GEMMART_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static GEMMART_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    static GEMMART_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static GEMMART_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }

    static constexpr bool kFreePowers = false;

    static GEMMART_INLINE F halves(Bytes p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    template <int Odd>
    static GEMMART_INLINE F bfloat16(B pairs) {
        return _mm256_castsi256_ps(Odd ? _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)))
                                       : _mm256_slli_epi32(pairs, 16));
    }
    static GEMMART_INLINE __m128i lane_bytes(Bytes p) { return _mm_loadl_epi64((const __m128i*)p); }
    static GEMMART_INLINE F from_u8(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)); }
    static GEMMART_INLINE F from_s8(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); }

    static GEMMART_INLINE B load_bytes(Bytes p) { return _mm256_loadu_si256((const __m256i*)p); }
    static GEMMART_INLINE B low_nibble(B x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
    static GEMMART_INLINE B high_nibble(B x) { return low_nibble(_mm256_srli_epi16(x, 4)); }
    template <int J>  // bits 2 J, 2 J + 1
    static GEMMART_INLINE B two_bits(B x) {
        return _mm256_and_si256(_mm256_srli_epi16(x, 2 * J), _mm256_set1_epi8(3));
    }
    template <int Bit>
    static GEMMART_INLINE B with_bit(B x, Bytes bits) {
        int mask;
        __builtin_memcpy(&mask, bits, 4);
        // byte i of the mask to bytes 8 i … 8 i + 7, of which each looks at its own bit
        const B spread = _mm256_shuffle_epi8(
            _mm256_set1_epi32(mask), _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
        const B own = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
        const B set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, own), own);
        return _mm256_or_si256(x, _mm256_and_si256(set, _mm256_set1_epi8(1 << Bit)));
    }
    static GEMMART_INLINE B look_up(const int8_t* levels, B numbers) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)levels)), numbers);
    }
    template <int J>  // bits 2 J, 2 J + 1 of `high` become bits 4, 5
    static GEMMART_INLINE B with_bits45(B x, B high) {
        const B at_four = J < 2 ? _mm256_slli_epi16(high, 4 - 2 * J) : _mm256_srli_epi16(high, 2 * J - 4);
        return _mm256_or_si256(x, _mm256_and_si256(at_four, _mm256_set1_epi8(48)));
    }
    static GEMMART_INLINE F halves(B x) {  // low ones of lanes
        return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
    }
    static GEMMART_INLINE F from_s32(B x) { return _mm256_cvtepi32_ps(x); }
    static GEMMART_INLINE F powers(__m128i exponents) {
        const B e = _mm256_cvtepu8_epi32(exponents);
        const B normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
        const B denormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), e);
        const B is_normal = _mm256_cmpgt_epi32(e, _mm256_set1_epi32(1));
        return _mm256_castsi256_ps(_mm256_blendv_epi8(denormal, normal, is_normal));
    }

    static GEMMART_INLINE B zero() { return _mm256_setzero_si256(); }
    static GEMMART_INLINE B set_bytes(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
    static GEMMART_INLINE B add_bytes(B x, B y) { return _mm256_add_epi8(x, y); }
    static GEMMART_INLINE B thirds(B x) {
        const B centred = _mm256_xor_si256(x, set_bytes(128));
        return _mm256_abs_epi8(_mm256_add_epi8(_mm256_cmpgt_epi8(centred, set_bytes(85 - 128)),
                                               _mm256_cmpgt_epi8(centred, set_bytes(170 - 128))));
    }

    static GEMMART_INLINE B words(Bytes p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
    static GEMMART_INLINE B widen(__m128i x) { return _mm256_cvtepu8_epi32(x); }
    template <int From, int To, int N>
    static GEMMART_INLINE B bits(B x) {
        if constexpr (From > To) x = _mm256_srli_epi32(x, From - To);
        if constexpr (From < To) x = _mm256_slli_epi32(x, To - From);
        return _mm256_and_si256(x, _mm256_set1_epi32(((1 << N) - 1) << To));
    }
    template <int Bit>
    static GEMMART_INLINE B all(B x) {
        return _mm256_srai_epi32(_mm256_slli_epi32(x, 31 - Bit), 31);
    }
    static GEMMART_INLINE B shift_right(B x, int n) { return _mm256_srl_epi32(x, _mm_cvtsi32_si128(n)); }
    static GEMMART_INLINE B gather(const uint32_t* table, B index) {
        return _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), index, 4);
    }

    // Without VNNI the bytes' products are added in pairs to int16, which saturates: biased int8 weights (up to 255)
    // would, so the sign goes to the activation instead.
    static GEMMART_INLINE void store_bytes(uint8_t* p, B x) { _mm256_storeu_si256((__m256i*)p, x); }
    static constexpr int kSignedBias = 0;
    static GEMMART_INLINE B signed_bytes(B x) { return x; }

    template <int kBits>
    struct Dot {
        // Slots whose pair sums, each at most 2 · (2^bits − 1) · 127, fit together in int16.
        static constexpr int kTogether = kBits == 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
        __m256i total, pairs;

        template <int kBias>
        GEMMART_INLINE void begin(const int32_t* sum) {
            static_assert((kBias & (kBias - 1)) == 0);
            total =
                kBias ? _mm256_slli_epi32(_mm256_set1_epi32(*sum), __builtin_ctz(kBias | 256)) : _mm256_setzero_si256();
        }

        template <int S>
        GEMMART_INLINE void add(B u, const int8_t* q) {
            int four;
            __builtin_memcpy(&four, q, 4);
            B x = _mm256_set1_epi32(four);
            if constexpr (kBits == 8) x = _mm256_sign_epi8(x, u), u = _mm256_abs_epi8(u);
            const B two = _mm256_maddubs_epi16(u, x);
            if constexpr (S % kTogether == 0) {
                if constexpr (S > 0) widen();
                pairs = two;
            } else {
                pairs = _mm256_add_epi16(pairs, two);
            }
            __asm__("" : "+x"(pairs));  // or GCC regroups the sums and needs more registers than there are
        }
        GEMMART_INLINE void widen() { total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
        GEMMART_INLINE void add(Dot& other) {
            other.widen();
            total = _mm256_add_epi32(total, other.total);
        }
        GEMMART_INLINE void add_256_times(Dot& other) {
            other.widen();
            total = _mm256_add_epi32(total, _mm256_slli_epi32(other.total, 8));
        }
        GEMMART_INLINE F sum() {
            widen();
            return _mm256_cvtepi32_ps(total);
        }
    };
};

}  // namespace
}  // namespace gemmart::cpu
