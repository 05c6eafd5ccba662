// The vectors of AVX-512, under the names that simd_math.h, vector_simd.h and attention_simd.h are written in.
// Everything is in an unnamed namespace: these files are compiled once for each ISA and must share nothing.
#pragma once

// GCC 12 takes the deliberately undefined vectors inside its own header for a fault.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstddef>
#include <cstdint>

namespace gemmart::cpu {
namespace {

using Vec = __m512;  // + - * / are the compiler's own, lane by lane

constexpr int kLanes = 16;
constexpr int kTileRows = 8;  // × 2 vectors: 16 sums of the 32 registers

inline __mmask16 first_lanes(int n) { return n >= kLanes ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
// Only the first n numbers are touched, n >= 1; lanes beyond are zero.
inline Vec load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_n(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }

inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// a · b − c in even lanes, a · b + c in odd ones.
inline Vec fma_alternate(Vec a, Vec b, Vec c) { return _mm512_fmaddsub_ps(a, b, c); }
// A NaN in b passes through; one in a does not.
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec magnitude(Vec v) { return _mm512_abs_ps(v); }
inline Vec with_sign_of(Vec v, Vec sign) { return _mm512_or_ps(v, _mm512_and_ps(sign, splat(-0.f))); }
inline Vec round_to_integer(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_2(Vec v, Vec integer) { return _mm512_scalef_ps(v, integer); }

// Lane i of v where bit i is set, `other` elsewhere.
inline Vec keep(Vec v, uint32_t bits, float other) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), splat(other), v);
}

// Bit i is set where lane i of a is greater than that of b.
inline uint32_t greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

inline Vec swap_pairs(Vec v) { return _mm512_permute_ps(v, 0xb1); }
// The first n (even) lanes, each pair of neighbours from one number: p[0], p[0], p[1], p[1] …
inline Vec load_pairs(const float* p, int n) {
    const __m512i index = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(first_lanes(n / 2), p));
}

inline float largest_of(Vec v) { return _mm512_reduce_max_ps(v); }

// Numbers without sign, compared by their bits: NaN > infinity > everything finite.
inline Vec max_bits(Vec a, Vec b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline float largest_bits_of(Vec v) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(v)))));
}

// Reading and writing kLanes numbers of a type of the KV cache; integers are rounded to nearest even.
inline Vec load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline Vec load_bfloat16(const void* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline Vec load_int8(const void* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
// Of kLanes groups of 4 the numbers i.
inline Vec load_byte_of_4(const void* p, int i) {
    const __m512i n = _mm512_slli_epi32(_mm512_loadu_si512(p), 24 - 8 * i);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(n, 24));
}
inline void store_half(void* p, Vec v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_int8(void* p, Vec v) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}

}  // namespace
}  // namespace gemmart::cpu
