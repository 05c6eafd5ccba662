// What the 32 lanes of a group do together. On waves of 64 lanes a group is half a wave.
#pragma once

namespace gemmart::gpu {

inline constexpr int kLanes = 32;

// Blocks have one dimension where these are used, and are made of whole groups.
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kLanes); }
__device__ __forceinline__ int group() { return static_cast<int>(threadIdx.x / kLanes); }

// The v of lane `from`, of lane() ^ mask, of lane() + n (the own one where there is no such lane).
template <typename T>
__device__ __forceinline__ T shuffle(T v, int from) {
#if GEMMART_EMULATED
    const unsigned char* slots = emulator::meet(kLanes, "shuffle", &v, sizeof v);
    T found;
    memcpy(&found, slots + from % kLanes * emulator::kSlotBytes, sizeof found);
    return found;
#elif GEMMART_HIP
    return __shfl(v, from, kLanes);
#else
    return __shfl_sync(0xffffffff, v, from);
#endif
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
#if GEMMART_EMULATED
    return shuffle(v, lane() ^ mask);
#elif GEMMART_HIP
    return __shfl_xor(v, mask, kLanes);
#else
    return __shfl_xor_sync(0xffffffff, v, mask);
#endif
}
template <typename T>
__device__ __forceinline__ T shuffle_down(T v, int n) {
#if GEMMART_EMULATED
    return shuffle(v, lane() + n < kLanes ? lane() + n : lane());
#elif GEMMART_HIP
    return __shfl_down(v, n, kLanes);
#else
    return __shfl_down_sync(0xffffffff, v, n);
#endif
}

// Of all lanes of the group, to each of them, with the same bits: pairs at a distance of 16, 8, 4, 2, 1.
template <typename T>
__device__ __forceinline__ T sum_lanes(T v) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
}
template <typename T>
__device__ __forceinline__ T max_lanes(T v) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
        const T other = shuffle_xor(v, mask);
        v = other > v ? other : v;
    }
    return v;
}

}  // namespace gemmart::gpu
