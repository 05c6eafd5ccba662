// Tiles on AMD. CDNA: v_mfma of a wave of 64 lanes; RDNA 3: v_wmma of 32; others: FMAs on shared memory. Compiled, not
// run; the emulator computes what v_mfma does.
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

#if defined(__gfx908__) || defined(__gfx90a__) || defined(__gfx940__) || defined(__gfx942__) || defined(__gfx950__) || \
    (GEMMART_EMULATED && GEMMART_WAVE == 64)
#define GEMMART_TILE_K 4  // elements of A and of B that a lane holds
#elif defined(__GFX11__)
#define GEMMART_TILE_K 16
#endif

#ifndef GEMMART_TILE_K
#include "cuda/tiles_plain.cuh"
#else

#if GEMMART_EMULATED
#include "emulator/matrix.h"
#else
#include "hip/matrix.h"
#endif

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

template <typename T>
__device__ __forceinline__ void multiply(TileC& c, const TileA<T>& a, const TileB<T>& b) {
    multiply_matrices(c.x, a.x, b.x);
}

}  // namespace gemmart::gpu
#endif
