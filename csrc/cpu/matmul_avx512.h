// The vectors of AVX-512 VNNI for matmul_x86.h: one zmm is a column of a panel.
#pragma once

// GCC 12 takes the undefined inputs inside its own intrinsics for mistakes of ours (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include "cpu/matmul_x86.h"

namespace gemmart::cpu {
namespace {

struct Avx512 {
    static constexpr int kLanes = 16, kTile = 8, kUnpackFrom = 64;
    using F = __m512;
    using B = __m512i;

    static GEMMART_INLINE F set(float x) { return _mm512_set1_ps(x); }
    static GEMMART_INLINE F broadcast(const float* p) { return _mm512_set1_ps(*p); }
    static GEMMART_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    static GEMMART_INLINE __mmask16 first(int n) { return n < 16 ? (1 << n) - 1 : 0xffff; }
    static GEMMART_INLINE F load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
    static GEMMART_INLINE void store_some(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
    static GEMMART_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static GEMMART_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static GEMMART_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    static GEMMART_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static GEMMART_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }

    static constexpr bool kFreePowers = true;  // scalef does not need the units that multiply bytes (Zen 4)
    static GEMMART_INLINE F significand(const float* d) {
        return _mm512_getmant_ps(broadcast(d), _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    }
    static GEMMART_INLINE F times_power(F t, const float* exponent) { return _mm512_scalef_ps(t, broadcast(exponent)); }

    static GEMMART_INLINE F halves(Bytes p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    template <int Odd>
    static GEMMART_INLINE F bfloat16(B pairs) {
        return _mm512_castsi512_ps(Odd ? _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000)))
                                       : _mm512_slli_epi32(pairs, 16));
    }
    static GEMMART_INLINE __m128i lane_bytes(Bytes p) { return _mm_loadu_si128((const __m128i*)p); }
    static GEMMART_INLINE F from_u8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x)); }
    static GEMMART_INLINE F from_s8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }

    static GEMMART_INLINE B load_bytes(Bytes p) { return _mm512_loadu_si512(p); }
    static GEMMART_INLINE B low_nibble(B x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static GEMMART_INLINE B high_nibble(B x) { return low_nibble(_mm512_srli_epi16(x, 4)); }
    template <int J>  // bits 2 J, 2 J + 1
    static GEMMART_INLINE B two_bits(B x) {
        return _mm512_and_si512(_mm512_srli_epi16(x, 2 * J), _mm512_set1_epi8(3));
    }
    template <int Bit>
    static GEMMART_INLINE B with_bit(B x, Bytes bits) {
        return _mm512_mask_add_epi8(x, _load_mask64((__mmask64*)bits), x, _mm512_set1_epi8(1 << Bit));
    }
    static GEMMART_INLINE B sub_bytes(B a, B b) { return _mm512_sub_epi8(a, b); }
    static GEMMART_INLINE B look_up(const int8_t* levels, B numbers) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)levels)), numbers);
    }
    template <int J>  // bits 2 J, 2 J + 1 of `high` become bits 4, 5
    static GEMMART_INLINE B with_bits45(B x, B high) {
        const B at_four = J < 2 ? _mm512_slli_epi16(high, 4 - 2 * J) : _mm512_srli_epi16(high, 2 * J - 4);
        return _mm512_ternarylogic_epi32(x, at_four, _mm512_set1_epi8(48), 0xf8);  // x | (at_four & 48)
    }
    static GEMMART_INLINE F halves(B x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }  // low ones of lanes
    static GEMMART_INLINE F from_s32(B x) { return _mm512_cvtepi32_ps(x); }
    static GEMMART_INLINE F powers(__m128i exponents) {
        const B e = _mm512_cvtepu8_epi32(exponents), one = _mm512_set1_epi32(1);
        const B normal = _mm512_slli_epi32(_mm512_sub_epi32(e, one), 23);
        return _mm512_castsi512_ps(_mm512_mask_sllv_epi32(normal, _mm512_cmple_epu32_mask(e, one),
                                                          _mm512_set1_epi32(0x200000), e));  // denormal
    }

    static GEMMART_INLINE B zero() { return _mm512_setzero_si512(); }
    static GEMMART_INLINE B set_bytes(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
    static GEMMART_INLINE B add_bytes(B x, B y) { return _mm512_add_epi8(x, y); }
    static GEMMART_INLINE B thirds(B x) {
        const B one = _mm512_set1_epi8(1);
        const B above = _mm512_maskz_mov_epi8(_mm512_cmpgt_epu8_mask(x, _mm512_set1_epi8(85)), one);
        return _mm512_mask_add_epi8(above, _mm512_cmpgt_epu8_mask(x, set_bytes(170)), above, one);
    }

    static GEMMART_INLINE B words(Bytes p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
    static GEMMART_INLINE B widen(__m128i x) { return _mm512_cvtepu8_epi32(x); }
    template <int From, int To, int N>
    static GEMMART_INLINE B bits(B x) {
        if constexpr (From > To) x = _mm512_srli_epi32(x, From - To);
        if constexpr (From < To) x = _mm512_slli_epi32(x, To - From);
        return _mm512_and_si512(x, _mm512_set1_epi32(((1 << N) - 1) << To));
    }
    template <int Bit>
    static GEMMART_INLINE B all(B x) {
        return _mm512_srai_epi32(_mm512_slli_epi32(x, 31 - Bit), 31);
    }
    static GEMMART_INLINE B shift_right(B x, int n) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(n)); }
    static GEMMART_INLINE B gather(const uint32_t* table, B index) { return _mm512_i32gather_epi32(index, table, 4); }

    static GEMMART_INLINE void store_bytes(uint8_t* p, B x) { _mm512_storeu_si512(p, x); }
    static constexpr int kSignedBias = 128;
    static GEMMART_INLINE B signed_bytes(B x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }

    template <int kBits>
    struct Dot {
        __m512i total;
        template <int kBias>
        GEMMART_INLINE void begin(const int32_t* sum) {
            static_assert((kBias & (kBias - 1)) == 0);
            total =
                kBias ? _mm512_slli_epi32(_mm512_set1_epi32(*sum), __builtin_ctz(kBias | 256)) : _mm512_setzero_si512();
        }
        template <int>
        GEMMART_INLINE void add(B u, const int8_t* q) {
            // GCC would load the four bytes into a register of their own.
            __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(total) : "v"(u), "m"(*reinterpret_cast<const int(*)>(q)));
        }
        GEMMART_INLINE void add(const Dot& other) { total = _mm512_add_epi32(total, other.total); }
        GEMMART_INLINE void add_256_times(const Dot& other) {
            total = _mm512_add_epi32(_mm512_slli_epi32(other.total, 8), total);
        }
        GEMMART_INLINE F sum() const { return _mm512_cvtepi32_ps(total); }
    };
};

}  // namespace
}  // namespace gemmart::cpu
