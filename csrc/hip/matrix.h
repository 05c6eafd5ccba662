// The instructions of hip/tiles.h: v_mfma_f32_16x16x16 of a wave of 64 lanes, each with four numbers of A and of B;
// v_wmma_f32_16x16x16 of 32 lanes, each with sixteen.
#pragma once

namespace gemmart::gpu {

namespace hip {
template <typename Number, int n>
using Vector = Number __attribute__((ext_vector_type(n)));
}

#if defined(__GFX11__)
__device__ __forceinline__ void multiply_matrices(float (&c)[8], const __nv_bfloat16 (&a)[16],
                                                  const __nv_bfloat16 (&b)[16]) {
    hip::Vector<short, 16> x, y;
    hip::Vector<float, 8> sum;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    memcpy(&sum, c, sizeof sum);
    sum = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(x, y, sum);
    memcpy(c, &sum, sizeof sum);
}
__device__ __forceinline__ void multiply_matrices(float (&c)[8], const __half (&a)[16], const __half (&b)[16]) {
    hip::Vector<_Float16, 16> x, y;
    hip::Vector<float, 8> sum;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    memcpy(&sum, c, sizeof sum);
    sum = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(x, y, sum);
    memcpy(c, &sum, sizeof sum);
}
#else
__device__ __forceinline__ void multiply_matrices(float (&c)[4], const __nv_bfloat16 (&a)[4],
                                                  const __nv_bfloat16 (&b)[4]) {
    hip::Vector<short, 4> x, y;
    hip::Vector<float, 4> sum;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    memcpy(&sum, c, sizeof sum);
#if defined(__gfx908__)
    // Eight rows of B each; that these are not neighbours does not matter, as A's columns are the same ones.
    sum = __builtin_amdgcn_mfma_f32_16x16x8bf16(x.xy, y.xy, sum, 0, 0, 0);
    sum = __builtin_amdgcn_mfma_f32_16x16x8bf16(x.zw, y.zw, sum, 0, 0, 0);
#else
    sum = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x, y, sum, 0, 0, 0);
#endif
    memcpy(c, &sum, sizeof sum);
}
__device__ __forceinline__ void multiply_matrices(float (&c)[4], const __half (&a)[4], const __half (&b)[4]) {
    hip::Vector<_Float16, 4> x, y;
    hip::Vector<float, 4> sum;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    memcpy(&sum, c, sizeof sum);
    sum = __builtin_amdgcn_mfma_f32_16x16x16f16(x, y, sum, 0, 0, 0);
    memcpy(c, &sum, sizeof sum);
}
#endif

}  // namespace gemmart::gpu
