// Numbers of 16 bits, products of four bytes, approximations. Whatever needs the same bits everywhere writes fmaf()
// where it is meant: compilers are told not to contract.
#pragma once

#include <stdint.h>

namespace gemmart::gpu {

// To the nearest, ties to even; T: __nv_bfloat16 or __half.
template <typename T>
__device__ __forceinline__ T round_to(float x);
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half round_to<__half>(float x) {
    return __float2half_rn(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Two of them in 32 bits, the first one in the low half.
template <typename T>
__device__ __forceinline__ uint32_t round_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t round_pair<__nv_bfloat16>(float first, float second) {
#if GEMMART_CUDA
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
#else
    return __float2bfloat16_rn(first).bits | static_cast<uint32_t>(__float2bfloat16_rn(second).bits) << 16;
#endif
}
template <>
__device__ __forceinline__ uint32_t round_pair<__half>(float first, float second) {
    const __half pair[2] = {__float2half_rn(first), __float2half_rn(second)};
    uint32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return bits;
}
template <typename T>
__device__ __forceinline__ float2 pair_to_floats(uint32_t pair);
template <>
__device__ __forceinline__ float2 pair_to_floats<__nv_bfloat16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}
template <>
__device__ __forceinline__ float2 pair_to_floats<__half>(uint32_t pair) {
    __half halves[2];
    memcpy(halves, &pair, sizeof halves);
    return make_float2(__half2float(halves[0]), __half2float(halves[1]));
}

// c + Σ a[i] · b[i] of four signed bytes each.
__device__ __forceinline__ int dot4(int a, int b, int c) {
#if GEMMART_EMULATED
    for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return c;
#elif GEMMART_HIP
    return hip::dot4(a, b, c);
#else
    return __dp4a(a, b, c);
#endif
}
// The same where a's bytes are unsigned.
__device__ __forceinline__ int dot4_unsigned_signed(unsigned a, int b, int c) {
#if GEMMART_EMULATED
    for (int i = 0; i < 32; i += 8) c += static_cast<uint8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return c;
#elif GEMMART_HIP
    return hip::dot4_unsigned_signed(a, b, c);
#else
    int sum;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
#endif
}

// 2^x, relative error at most 2^-22; 1 / x, at most 2^-22.
__device__ __forceinline__ float exp2_approximate(float x) {
#if GEMMART_CUDA
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);  // HIP's is the hardware's instruction, with the range below 2^-126
#endif
}
__device__ __forceinline__ float reciprocal_approximate(float x) {
#if GEMMART_CUDA
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#elif GEMMART_HIP
    return __builtin_amdgcn_rcpf(x);
#else
    return 1 / x;
#endif
}

// e^x, relative error at most 2^-22 + |x| · 2^-23; 0 and infinity where a float ends.
__device__ __forceinline__ float fast_exp(float x) { return exp2_approximate(x * 1.4426950408889634f); }
// tanh x, absolute error at most 2^-21. (tanh.approx of sm_75 has 2^-11, too coarse below a soft cap of 50.)
__device__ __forceinline__ float fast_tanh(float x) {
    const float e = exp2_approximate(x * 2.8853900817779268f);  // e^2x
    return fmaf(-2.0f, reciprocal_approximate(e + 1.0f), 1.0f);
}

}  // namespace gemmart::gpu
