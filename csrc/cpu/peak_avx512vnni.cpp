// The multiply instructions of AVX-512 VNNI on sixteen independent sums.
#include <immintrin.h>

#include "cpu/tables.h"

namespace gemmart::cpu {
namespace {

// Makes the compiler take `x` for unknown, so that equal sums are not computed once.
#define GEMMART_UNKNOWN(x) __asm__ volatile("" : "+v"(x))

constexpr int kSums = 16;

int64_t multiply_int8(int rounds) {
    __m512i sums[kSums] = {}, x = _mm512_set1_epi8(1);
#pragma GCC unroll 16
    for (auto& sum : sums) GEMMART_UNKNOWN(sum);
    for (int round = 0; round < rounds; ++round) {
        GEMMART_UNKNOWN(x);
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], x, x);
    }
#pragma GCC unroll 16
    for (auto& sum : sums) GEMMART_UNKNOWN(sum);
    return int64_t{rounds} * kSums * 64;
}

int64_t multiply_float(int rounds) {
    __m512 sums[kSums] = {}, x = _mm512_set1_ps(0.5f);
#pragma GCC unroll 16
    for (auto& sum : sums) GEMMART_UNKNOWN(sum);
    for (int round = 0; round < rounds; ++round) {
        GEMMART_UNKNOWN(x);
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_fmadd_ps(sums[i], x, x);
    }
#pragma GCC unroll 16
    for (auto& sum : sums) GEMMART_UNKNOWN(sum);
    return int64_t{rounds} * kSums * 16;
}

}  // namespace

void fill_peak_avx512vnni(Kernels& k) {
    k.multiply_int8 = multiply_int8;
    k.multiply_float = multiply_float;
}

}  // namespace gemmart::cpu
