// Tiles on AMD. CDNA: v_mfma of a wave of 64 lanes; RDNA 3: v_wmma of 32; others: FMAs on shared memory. Compiled, not
// run; csrc/emulator/tiles.h computes what v_mfma does.
//
//   MFMA   lane l holds A[l % 16][4 (l / 16) … +3], B[4 (l / 16) … +3][l % 16], C[4 (l / 16) + i][l % 16]
//   WMMA   A[l % 16][all], B[all][l % 16] (the upper half-wave repeats the lower one), C[2 i + l / 16][l % 16]
#pragma once

namespace gemmart::gpu {

inline constexpr int kTileN = 16, kTileLanes = GEMMART_WAVE, kTileElements = kTileM * kTileN / kTileLanes;

__device__ __forceinline__ int tile_lane() { return static_cast<int>(threadIdx.x % kTileLanes); }
__device__ __forceinline__ int tile_row(int i) {
    return kTileLanes == 64 ? tile_lane() / 16 * 4 + i : 2 * i + tile_lane() / 16;
}
__device__ __forceinline__ int tile_col(int) { return tile_lane() % 16; }

struct TileC {
    float x[kTileElements];
};

}  // namespace gemmart::gpu

#if defined(__gfx908__) || defined(__gfx90a__) || defined(__gfx940__) || defined(__gfx942__) || defined(__gfx950__)
#define GEMMART_TILE_K 4  // elements of A and of B that a lane holds
#elif defined(__GFX11__)
#define GEMMART_TILE_K 16
#endif

#ifndef GEMMART_TILE_K
#include "cuda/tiles_plain.cuh"
#else

namespace gemmart::gpu {

template <typename T>
struct alignas(2 * GEMMART_TILE_K) TileA {
    T x[GEMMART_TILE_K];
};
template <typename T>
struct alignas(2 * GEMMART_TILE_K) TileB {
    T x[GEMMART_TILE_K];
};

__device__ __forceinline__ int tile_first_k() { return GEMMART_TILE_K == 4 ? tile_lane() / 16 * 4 : 0; }

template <typename T>
__device__ __forceinline__ void load_a(TileA<T>& a, const T* shared, int ld) {
    memcpy(&a, __builtin_assume_aligned(shared + tile_lane() % 16 * ld + tile_first_k(), 8), sizeof a);
}
template <typename T>
__device__ __forceinline__ void load_b(TileB<T>& b, const T* shared, int ld) {
    memcpy(&b, __builtin_assume_aligned(shared + tile_lane() % 16 * ld + tile_first_k(), 8), sizeof b);
}
template <typename T>
__device__ __forceinline__ void load_b_transposed(TileB<T>& b, const T* shared, int ld) {
#pragma unroll
    for (int k = 0; k < GEMMART_TILE_K; k++) b.x[k] = shared[(tile_first_k() + k) * ld + tile_lane() % 16];
}

namespace hip {
using Floats = float __attribute__((ext_vector_type(kTileElements)));
using Shorts = short __attribute__((ext_vector_type(GEMMART_TILE_K)));
using Halves = _Float16 __attribute__((ext_vector_type(GEMMART_TILE_K)));
}  // namespace hip

__device__ __forceinline__ void multiply(TileC& c, const TileA<__nv_bfloat16>& a, const TileB<__nv_bfloat16>& b) {
    const auto x = __builtin_bit_cast(hip::Shorts, a), y = __builtin_bit_cast(hip::Shorts, b);
    auto sum = __builtin_bit_cast(hip::Floats, c);
#if defined(__GFX11__)
    sum = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(x, y, sum);
#elif defined(__gfx908__)
    // Of 8 rows of B each; that these are not neighbours does not matter, as A's columns are the same ones.
    sum = __builtin_amdgcn_mfma_f32_16x16x8bf16(x.xy, y.xy, sum, 0, 0, 0);
    sum = __builtin_amdgcn_mfma_f32_16x16x8bf16(x.zw, y.zw, sum, 0, 0, 0);
#else
    sum = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x, y, sum, 0, 0, 0);
#endif
    c = __builtin_bit_cast(TileC, sum);
}
__device__ __forceinline__ void multiply(TileC& c, const TileA<__half>& a, const TileB<__half>& b) {
    const auto x = __builtin_bit_cast(hip::Halves, a), y = __builtin_bit_cast(hip::Halves, b);
    auto sum = __builtin_bit_cast(hip::Floats, c);
#if defined(__GFX11__)
    sum = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(x, y, sum);
#else
    sum = __builtin_amdgcn_mfma_f32_16x16x16f16(x, y, sum, 0, 0, 0);
#endif
    c = __builtin_bit_cast(TileC, sum);
}

}  // namespace gemmart::gpu
#endif
