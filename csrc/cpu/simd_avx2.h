// The vectors of AVX2 with FMA and F16C, under the names that simd_math.h, vector_simd.h and attention_simd.h are
// written in. Everything is in an unnamed namespace: these files are compiled once for each ISA and must share nothing.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace gemmart::cpu {
namespace {

using Vec = __m256;  // + - * / are the compiler's own, lane by lane

constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // × 2 vectors: 12 sums of the 16 registers

constexpr int32_t kOnesThenZeros[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
inline __m256i first_lanes(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnesThenZeros + 8 - (n < 8 ? n : 8)));
}

inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
// Only the first n numbers are touched, n >= 1; lanes beyond are zero.
inline Vec load_n(const float* p, int n) { return n >= kLanes ? load(p) : _mm256_maskload_ps(p, first_lanes(n)); }
inline void store_n(float* p, Vec v, int n) {
    if (n >= kLanes)
        store(p, v);
    else
        _mm256_maskstore_ps(p, first_lanes(n), v);
}

inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// a · b − c in even lanes, a · b + c in odd ones.
inline Vec fma_alternate(Vec a, Vec b, Vec c) { return _mm256_fmaddsub_ps(a, b, c); }
// A NaN in b passes through; one in a does not.
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec magnitude(Vec v) { return _mm256_andnot_ps(splat(-0.f), v); }
inline Vec with_sign_of(Vec v, Vec sign) { return _mm256_or_ps(v, _mm256_and_ps(sign, splat(-0.f))); }
inline Vec round_to_integer(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// In two steps, each a normal power: |integer| < 252.
inline Vec times_power_of_2(Vec v, Vec integer) {
    const __m256i n = _mm256_cvtps_epi32(integer), half = _mm256_srai_epi32(n, 1), bias = _mm256_set1_epi32(127);
    const __m256i exponents[2] = {_mm256_add_epi32(half, bias), _mm256_add_epi32(_mm256_sub_epi32(n, half), bias)};
    return v * _mm256_castsi256_ps(_mm256_slli_epi32(exponents[0], 23)) *
           _mm256_castsi256_ps(_mm256_slli_epi32(exponents[1], 23));
}

// Lane i of v where bit i is set, `other` elsewhere.
inline Vec keep(Vec v, uint32_t bits, float other) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i mask = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
    return _mm256_blendv_ps(splat(other), v, _mm256_castsi256_ps(mask));
}

// Bit i is set where lane i of a is greater than that of b.
inline uint32_t greater(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}

inline Vec swap_pairs(Vec v) { return _mm256_permute_ps(v, 0xb1); }
// The first n (even) lanes, each pair of neighbours from one number: p[0], p[0], p[1], p[1] …
inline Vec load_pairs(const float* p, int n) {
    const __m128 numbers = _mm_maskload_ps(p, _mm256_castsi256_si128(first_lanes(n / 2)));
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(numbers), _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}

inline float largest_of(Vec v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// Numbers without sign, compared by their bits: NaN > infinity > everything finite.
inline Vec max_bits(Vec a, Vec b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline float largest_bits_of(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    x = _mm_max_epi32(x, _mm_unpackhi_epi64(x, x));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0x55))));
}

// Reading and writing kLanes numbers of a type of the KV cache; integers are rounded to nearest even.
inline Vec load_half(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline Vec load_bfloat16(const void* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
inline Vec load_int8(const void* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
// Of kLanes groups of 4 the numbers i.
inline Vec load_byte_of_4(const void* p, int i) {
    const __m256i n = _mm256_slli_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)), 24 - 8 * i);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(n, 24));
}
inline void store_half(void* p, Vec v) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_int8(void* p, Vec v) {
    const __m256i n = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

}  // namespace
}  // namespace gemmart::cpu
