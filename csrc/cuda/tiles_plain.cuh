// Tiles without tensor cores: pointers to shared memory, multiplied by FMAs in order of k. The file that includes this
// says which elements of C a lane has.
#pragma once

namespace gemmart::gpu {

template <typename T>
struct TileA {
    const T* shared;
    int ld;
};
template <typename T>
struct TileB {
    const T* shared;
    int n_stride, k_stride;  // one of them 1
};

template <typename T>
__device__ __forceinline__ void load_a(TileA<T>& a, const T* shared, int ld) {
    a = {shared, ld};
}
template <typename T>
__device__ __forceinline__ void load_b(TileB<T>& b, const T* shared, int ld) {
    b = {shared, ld, 1};
}
template <typename T>
__device__ __forceinline__ void load_b_transposed(TileB<T>& b, const T* shared, int ld) {
    b = {shared, 1, ld};
}

template <typename T>
__device__ __forceinline__ void multiply(TileC& c, const TileA<T>& a, const TileB<T>& b) {
#pragma unroll
    for (int i = 0; i < kTileElements; i++) {
        const T* row = a.shared + tile_row(i) * a.ld;
        const T* column = b.shared + tile_col(i) * b.n_stride;
#pragma unroll
        for (int k = 0; k < kTileK; k++) c.x[i] = fmaf(to_float(row[k]), to_float(column[k * b.k_stride]), c.x[i]);
    }
}

}  // namespace gemmart::gpu
