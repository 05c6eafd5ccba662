// C += A · B on tensor cores, in tiles that kTileLanes lanes own together (all of a group of 32, or of a wave of 64):
// A [kTileM, kTileK] and B [kTileK, kTileN] of bf16 or half, C of float. What a lane holds of them is up to the
// hardware; of C it is x[i] at (tile_row(i), tile_col(i)).
//
//   load_a(a, shared, ld)              A[m][k] = shared[m · ld + k]
//   load_b(b, shared, ld)              B[k][n] = shared[n · ld + k], the rows of weights
//   load_b_transposed(b, shared, ld)   B[k][n] = shared[k · ld + n]
//   multiply(c, a, b)                  C += A · B
//
// shared: the same for all lanes; each row begins at a multiple of 16 bytes, so ld is a multiple of 8. Rows of 16 bytes
// are read by 8 at a time: they meet in no bank where ld · 2 bytes is an odd multiple of 16. Where there are no tensor
// cores a tile is a pointer, so what it was loaded from stays as it is until multiply().
#pragma once

namespace gemmart::gpu {

inline constexpr int kTileM = 16, kTileK = 16;

}  // namespace gemmart::gpu

#if GEMMART_HIP || GEMMART_EMULATED_WAVE == 64 || GEMMART_EMULATED_PLAIN_TILES
#include "hip/tiles.h"
#else
#include "cuda/tiles_mma.cuh"
#endif
