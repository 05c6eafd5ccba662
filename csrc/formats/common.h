// What every format needs. All functions of formats/ are static: the headers are compiled into files with different
// instruction sets, and a shared (weak) copy would carry AVX into the baseline. Blocks are packed: a model may start at
// any byte of its file.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define GEMMART_HD __device__
#define GEMMART_TABLE static __device__ const
#else
#define GEMMART_HD
#define GEMMART_TABLE static constexpr
#endif
#define GEMMART_PACKED __attribute__((packed))

namespace gemmart {

static inline GEMMART_HD float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// IEEE half: 1 sign bit, 5 of exponent, 10 of fraction.
static inline GEMMART_HD float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h >> 15) << 31;
    const uint32_t exponent = h >> 10 & 31;
    const uint32_t fraction = h & 1023;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000 | fraction << 13);  // infinity, NaN
    if (exponent != 0) return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    const float x = static_cast<float>(fraction) * 0x1p-24f;  // zero, denormal
    return sign ? -x : x;
}

static inline GEMMART_HD float bfloat16_to_float(uint16_t h) { return float_from_bits(static_cast<uint32_t>(h) << 16); }

}  // namespace gemmart
