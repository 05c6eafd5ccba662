// The multiply instruction of AVX-VNNI on twelve independent sums.
#include <immintrin.h>

#include "cpu/tables.h"

namespace gemmart::cpu {
namespace {

int64_t multiply_int8(int rounds) {
    constexpr int kSums = 12;
    __m256i sums[kSums] = {}, x = _mm256_set1_epi8(1);
#pragma GCC unroll 12
    for (auto& sum : sums) __asm__ volatile("" : "+x"(sum));  // equal sums must not be computed once
    for (int round = 0; round < rounds; ++round) {
        __asm__ volatile("" : "+x"(x));
#pragma GCC unroll 12
        for (auto& sum : sums) sum = _mm256_dpbusd_avx_epi32(sum, x, x);
    }
#pragma GCC unroll 12
    for (auto& sum : sums) __asm__ volatile("" : "+x"(sum));
    return int64_t{rounds} * kSums * 32;
}

}  // namespace

void fill_peak_avxvnni(Kernels& k) { k.multiply_int8 = multiply_int8; }

}  // namespace gemmart::cpu
