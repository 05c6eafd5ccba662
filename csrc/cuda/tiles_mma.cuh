// mma.sync m16n8k16. Lane l = 4 g + t holds, of 16-bit pairs (the lower column first):
//
//   A   r[0]: row g, columns 2t, 2t+1     r[1]: row g+8     r[2], r[3]: the same at columns 2t+8, 2t+9
//   B   r[0]: rows 2t, 2t+1, column g     r[1]: rows 2t+8, 2t+9
//   C   x[0], x[1]: row g, columns 2t, 2t+1     x[2], x[3]: row g+8
//
// ldmatrix reads 8 rows of 16 bytes for each 8 lanes that give their addresses, into these places. The emulator
// computes what both instructions do.
#pragma once

namespace gemmart::gpu {

inline constexpr int kTileN = 8, kTileLanes = 32, kTileElements = 4;

__device__ __forceinline__ int tile_row(int i) { return lane() / 4 + (i / 2) * 8; }
__device__ __forceinline__ int tile_col(int i) { return lane() % 4 * 2 + i % 2; }

struct TileC {
    float x[kTileElements];
};

}  // namespace gemmart::gpu

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#include "cuda/tiles_plain.cuh"
#else

#if GEMMART_EMULATED
#include "emulator/matrix.h"
#else
#include "cuda/matrix.cuh"
#endif

namespace gemmart::gpu {

template <typename T>
struct TileA {
    uint32_t r[4];
};
template <typename T>
struct TileB {
    uint32_t r[2];
};

// Lanes 0 … 7 give the rows of r[0], 8 … 15 those of r[1] and so on; what lanes above them give is not read.
template <typename T>
__device__ __forceinline__ void load_a(TileA<T>& a, const T* shared, int ld) {
    load_matrices(a.r, shared + lane() % 16 * ld + lane() / 16 * 8);
}
template <typename T>
__device__ __forceinline__ void load_b(TileB<T>& b, const T* shared, int ld) {
    load_matrices(b.r, shared + lane() % 8 * ld + lane() / 8 % 2 * 8);
}
template <typename T>
__device__ __forceinline__ void load_b_transposed(TileB<T>& b, const T* shared, int ld) {
    load_matrices_transposed(b.r, shared + lane() % 16 * ld);
}

template <typename T>
__device__ __forceinline__ void multiply(TileC& c, const TileA<T>& a, const TileB<T>& b) {
    multiply_matrices<T>(c.x, a.r, b.r);
}

}  // namespace gemmart::gpu
#endif
