// The multiply instructions of AVX2 on twelve independent sums. Bytes are multiplied in pairs and added in 16 bits, the
// least that a product of integers needs; kernels have to widen these sums besides.
#include <immintrin.h>

#include "cpu/tables.h"

namespace gemmart::cpu {
namespace {

// Makes the compiler take `x` for unknown, so that equal sums are not computed once.
#define GEMMART_UNKNOWN(x) __asm__ volatile("" : "+x"(x))

constexpr int kSums = 12;

int64_t multiply_int8(int rounds) {
    __m256i sums[kSums] = {}, x = _mm256_set1_epi8(1);
#pragma GCC unroll 12
    for (auto& sum : sums) GEMMART_UNKNOWN(sum);
    for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) {
            GEMMART_UNKNOWN(x);
            sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(x, x));
        }
    }
#pragma GCC unroll 12
    for (auto& sum : sums) GEMMART_UNKNOWN(sum);
    return int64_t{rounds} * kSums * 32;
}

int64_t multiply_float(int rounds) {
    __m256 sums[kSums] = {}, x = _mm256_set1_ps(0.5f);
#pragma GCC unroll 12
    for (auto& sum : sums) GEMMART_UNKNOWN(sum);
    for (int round = 0; round < rounds; ++round) {
        GEMMART_UNKNOWN(x);
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) sums[i] = _mm256_fmadd_ps(sums[i], x, x);
    }
#pragma GCC unroll 12
    for (auto& sum : sums) GEMMART_UNKNOWN(sum);
    return int64_t{rounds} * kSums * 8;
}

}  // namespace

void fill_peak_avx2(Kernels& k) {
    k.multiply_int8 = multiply_int8;
    k.multiply_float = multiply_float;
}

}  // namespace gemmart::cpu
