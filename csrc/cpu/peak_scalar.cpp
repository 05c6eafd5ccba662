// The most that plain C++ multiplies, as the compiler's baseline vectors.
#include "cpu/tables.h"

namespace gemmart::cpu {
namespace {

constexpr int kSums = 32;

int64_t multiply_int8_scalar(int rounds) {
    int sums[kSums] = {}, x = 3;
    for (int round = 0; round < rounds; ++round) {
        __asm__ volatile("" : "+r"(x), "+m"(sums));
        for (int& sum : sums) sum += x * static_cast<int8_t>(x);
    }
    return int64_t{rounds} * kSums;
}

int64_t multiply_float_scalar(int rounds) {
    float sums[kSums] = {}, x = 0.5f;
    for (int round = 0; round < rounds; ++round) {
        __asm__ volatile("" : "+m"(x), "+m"(sums));
        for (float& sum : sums) sum = sum * x + x;
    }
    return int64_t{rounds} * kSums;
}

}  // namespace

void fill_peak_scalar(Kernels& k) {
    k.multiply_int8 = multiply_int8_scalar;
    k.multiply_float = multiply_float_scalar;
}

}  // namespace gemmart::cpu
