// bfloat16 where the compiler brings no type of its own (HIP before 6, the emulator), under CUDA's name.
#pragma once

#include <stdint.h>

struct __nv_bfloat16 {
    uint16_t bits;
};

// To the nearest, ties to even; NaN stays NaN.
static inline __host__ __device__ __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>(bits >> 16 | 64)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
static inline __host__ __device__ float __bfloat162float(__nv_bfloat16 x) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
