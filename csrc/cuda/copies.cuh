// 16 bytes from the device's memory to shared memory while the thread goes on: cp.async on sm_80 and newer, where the
// bytes need no registers; elsewhere copied at once. Both addresses are multiples of 16. A thread waits for its own
// copies only: __syncthreads() comes behind wait_copies().
#pragma once

namespace gemmart::gpu {

__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
#if GEMMART_EMULATED
    emulator::copy_later(shared, global);
#elif GEMMART_CUDA && __CUDA_ARCH__ >= 800
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
        "l"(__cvta_generic_to_global(global))
        : "memory");
#else
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
#if GEMMART_EMULATED
    emulator::commit_copies();
#elif GEMMART_CUDA && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most the newest N groups are on their way.
template <int N>
__device__ __forceinline__ void wait_copies() {
#if GEMMART_EMULATED
    emulator::wait_copies(N);
#elif GEMMART_CUDA && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace gemmart::gpu
