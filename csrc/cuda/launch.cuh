// Starting kernels, and errors of the runtime as exceptions.
#pragma once

#include <stddef.h>

#include <string>
#include <type_traits>

#include "error.h"

#if GEMMART_CUDA
#include <map>
#include <mutex>
#include <utility>
#endif

namespace gemmart::gpu {

// what: what was done, for the message.
inline void check_device(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // it is reported once
    const std::string text = message(what, ": ", cudaGetErrorString(error));
    if (error == cudaErrorMemoryAllocation) throw OutOfMemory(text);
    throw DeviceError(text);
}

// As GemmartDevice says it: "sm_90", "gfx90a", "emulated".
inline std::string device_arch([[maybe_unused]] const cudaDeviceProp& device) {
#if GEMMART_EMULATED
    return "emulated";
#elif GEMMART_HIP
    const std::string name = device.gcnArchName;  // "gfx90a:sramecc+:xnack-"
    return name.substr(0, name.find(':'));
#else
    return message("sm_", device.major, device.minor);
#endif
}

// Bytes of shared memory that a block may be launched with.
inline size_t shared_memory_limit(int device) {
    int bytes = 0;
#if GEMMART_HIP
    const auto attribute = hipDeviceAttributeMaxSharedMemoryPerBlock;
#else
    const auto attribute = cudaDevAttrMaxSharedMemoryPerBlockOptin;
#endif
    check_device(cudaDeviceGetAttribute(&bytes, attribute, device), "device");
    return static_cast<size_t>(bytes);
}

// A kernel's first statement, or its first behind loads of what no kernel writes (weights). With programmatic launches
// (sm_90 and newer) the kernel before may still run until here, and every kernel has to wait, since the next one
// relies on all that came before.
__device__ __forceinline__ void wait_for_previous() {
#if GEMMART_EMULATED
    emulator::wait_for_previous();
#elif GEMMART_CUDA && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may begin with what it does before wait_for_previous().
__device__ __forceinline__ void let_next_start() {
#if GEMMART_CUDA && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if GEMMART_CUDA
// Graphs, and so recorded passes, have programmatic launches since CUDA 12.3; a module of CUDA 12 may meet an older
// driver.
inline constexpr int kProgrammaticDriver = 12030;

// What has been asked of and told the driver about a kernel on a device.
struct KernelState {
    bool programmatic = false;  // its code waits for the previous kernel itself: compiled for sm_90 or newer
    int shared_bytes = 48 * 1024;
};
inline KernelState prepare_kernel(const void* kernel, size_t shared_bytes) {
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, KernelState> states;
    int device;
    check_device(cudaGetDevice(&device), "device");
    const std::lock_guard lock(mutex);
    const auto [found, is_new] = states.try_emplace({device, kernel});
    KernelState& state = found->second;
    if (is_new) {
        cudaFuncAttributes attributes;
        int driver = 0;
        cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
        if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
        if (error != cudaSuccess) states.erase(found);
        check_device(error, "kernel");
        state.programmatic = attributes.ptxVersion >= 90 && driver >= kProgrammaticDriver;
    }
    const int wanted = static_cast<int>(shared_bytes);
    if (wanted > state.shared_bytes) {
        check_device(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, wanted),
                     "shared memory of a kernel");
        state.shared_bytes = wanted;
    }
    return state;
}
#endif

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            std::type_identity_t<Parameters>... arguments) {
#if GEMMART_EMULATED
    check_device(emulator::submit_kernel(grid, block, shared_bytes, stream, [=] { kernel(arguments...); }), "kernel");
#else
    void* pointers[] = {&arguments..., nullptr};
#if GEMMART_HIP
    check_device(hipLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes, stream),
                 "kernel");
#else
    const void* code = reinterpret_cast<const void*>(kernel);
    const KernelState state = prepare_kernel(code, shared_bytes);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = state.programmatic ? 1 : 0;
    check_device(cudaLaunchKernelExC(&config, code, pointers), "kernel");
#endif
#endif
}

}  // namespace gemmart::gpu
