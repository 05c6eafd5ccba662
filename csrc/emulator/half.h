// IEEE half with CUDA's names.
#pragma once

#include <stdint.h>

#include "formats/common.h"

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) { return gemmart::half_to_float(x.bits); }

// To the nearest, ties to even.
inline __half __float2half_rn(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};   // NaN
    if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and more: infinity
    if (magnitude < 0x38800000) {  // below 2^-14: in units of 2^-24, which adding 0.5 rounds to
        const uint32_t sum = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f);
        return {static_cast<uint16_t>(sign | (sum - 0x3f000000))};
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13))};
}
