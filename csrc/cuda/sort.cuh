// Bitonic sorts of 64-bit keys, the largest first: of kSorted keys in shared memory, and of more by steps over all.
#pragma once

#include "cuda/device.cuh"

namespace gemmart::gpu {

inline constexpr int kSorted = 2048;
inline constexpr int kSortThreads = 256;

__device__ __forceinline__ void order_pair(uint64_t& a, uint64_t& b, bool descending) {
    const uint64_t x = a, y = b;
    if ((x < y) == descending) a = y, b = x;
}

// Merges runs of `size` keys of a block, whose first and second halves are sorted in opposite directions. The runs'
// directions alternate, beginning with `descending`.
__device__ __forceinline__ void merge_runs(uint64_t* keys, int size, bool descending) {
    for (int stride = min(size, kSorted) / 2; stride > 0; stride /= 2) {
        __syncthreads();
        for (int pair = threadIdx.x; pair < kSorted / 2; pair += kSortThreads) {
            const int i = pair / stride * 2 * stride + pair % stride;
            order_pair(keys[i], keys[i + stride], ((i & size) == 0) == descending);
        }
    }
}

__device__ __forceinline__ void sort_block(uint64_t* keys, bool descending) {
    for (int size = 2; size <= kSorted; size *= 2) merge_runs(keys, size, descending || size < kSorted);
    __syncthreads();
}

}  // namespace gemmart::gpu
