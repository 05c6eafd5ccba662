// mma.sync m16n8k16. Lane l = 4 g + t holds, of 16-bit pairs (the lower column first):
//
//   A   r[0]: row g, columns 2t, 2t+1     r[1]: row g+8     r[2], r[3]: the same at columns 2t+8, 2t+9
//   B   r[0]: rows 2t, 2t+1, column g     r[1]: rows 2t+8, 2t+9
//   C   x[0], x[1]: row g, columns 2t, 2t+1     x[2], x[3]: row g+8
//
// ldmatrix reads 8 rows of 16 bytes for each 8 lanes that give their addresses, into these places.
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

namespace gemmart::gpu {

template <typename T>
struct TileA {
    uint32_t r[4];
};
template <typename T>
struct TileB {
    uint32_t r[2];
};

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

template <typename T>
__device__ __forceinline__ void load_a(TileA<T>& a, const T* shared, int ld) {
    const int l = lane();
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a.r[0]), "=r"(a.r[1]), "=r"(a.r[2]), "=r"(a.r[3])
                 : "r"(shared_address(shared + l % 16 * ld + l / 16 * 8))
                 : "memory");
}
template <typename T>
__device__ __forceinline__ void load_b(TileB<T>& b, const T* shared, int ld) {
    const int l = lane() % 16;  // the addresses of the others are not read
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(b.r[0]), "=r"(b.r[1])
                 : "r"(shared_address(shared + l % 8 * ld + l / 8 * 8))
                 : "memory");
}
template <typename T>
__device__ __forceinline__ void load_b_transposed(TileB<T>& b, const T* shared, int ld) {
    const int l = lane() % 16;
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(b.r[0]), "=r"(b.r[1])
                 : "r"(shared_address(shared + l * ld))
                 : "memory");
}

__device__ __forceinline__ void multiply(TileC& c, const TileA<__nv_bfloat16>& a, const TileB<__nv_bfloat16>& b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
}
__device__ __forceinline__ void multiply(TileC& c, const TileA<__half>& a, const TileB<__half>& b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
}

}  // namespace gemmart::gpu
#endif
