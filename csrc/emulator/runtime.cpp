#include "emulator/runtime.h"

#include <stdlib.h>

#include "emulator/state.h"

using namespace gemmart::emulator;

namespace {

constexpr size_t kShared = 48 * 1024;  // of a block, without being asked for

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string failure;

}  // namespace

namespace gemmart::emulator {

cudaError_t keep(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}
void set_failure(std::string reason) { failure = std::move(reason); }

std::string setting(const char* name, const char* otherwise) {
    const char* text = getenv(name);
    return text && *text ? text : otherwise;
}
size_t device_memory() { return strtoull(setting("GEMMART_EMULATED_MEMORY", "1073741824").c_str(), nullptr, 10); }

cudaError_t find_device(int device) {
    int n = 0;
    if (const cudaError_t error = cudaGetDeviceCount(&n); error != cudaSuccess) return error;
    return device < 0 || device >= n ? cudaErrorInvalidDevice : cudaSuccess;
}
int device_now() { return current_device; }

}  // namespace gemmart::emulator

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "cudaSuccess";
        case cudaErrorInvalidValue:
            return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation:
            return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidConfiguration:
            return "cudaErrorInvalidConfiguration";
        case cudaErrorInsufficientDriver:
            return "cudaErrorInsufficientDriver";
        case cudaErrorNoDevice:
            return "cudaErrorNoDevice";
        case cudaErrorInvalidDevice:
            return "cudaErrorInvalidDevice";
        case cudaErrorInvalidResourceHandle:
            return "cudaErrorInvalidResourceHandle";
        case cudaErrorNotReady:
            return "cudaErrorNotReady";
        case cudaErrorLaunchOutOfResources:
            return "cudaErrorLaunchOutOfResources";
        case cudaErrorLaunchFailure:
            return "cudaErrorLaunchFailure";
        case cudaErrorStreamCaptureUnsupported:
            return "cudaErrorStreamCaptureUnsupported";
    }
    return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorInsufficientDriver:
            return "there is no driver";
        case cudaErrorNoDevice:
            return "no device is detected";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
        case cudaErrorInvalidResourceHandle:
            return "invalid resource handle";
        case cudaErrorNotReady:
            return "device not ready";
        case cudaErrorLaunchOutOfResources:
            return "too many resources requested for launch";
        case cudaErrorLaunchFailure:
            return failure.c_str();
        case cudaErrorStreamCaptureUnsupported:
            return "operation not permitted when stream is capturing";
    }
    return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDeviceCount(int* n) {
    const int devices = atoi(setting("GEMMART_EMULATED_DEVICES", "1").c_str());
    *n = devices < 0 ? 0 : devices;
    return keep(devices < 0 ? cudaErrorInsufficientDriver : devices == 0 ? cudaErrorNoDevice : cudaSuccess);
}
cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    const cudaError_t error = find_device(device);
    if (error == cudaSuccess) current_device = device;
    return keep(error);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int device) {
    if (const cudaError_t error = find_device(device); error != cudaSuccess) return keep(error);
    *found = {};
    strcpy(found->name, "emulator");
    found->totalGlobalMem = device_memory();
    found->sharedMemPerBlock = kShared;
    found->sharedMemPerBlockOptin = kMostShared;
    found->multiProcessorCount = 2;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp found;
    if (const cudaError_t error = cudaGetDeviceProperties(&found, device); error != cudaSuccess) return error;
    switch (attribute) {
        case cudaDevAttrMaxSharedMemoryPerBlock:
            *value = static_cast<int>(found.sharedMemPerBlock);
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = static_cast<int>(found.sharedMemPerBlockOptin);
            break;
        case cudaDevAttrMultiProcessorCount:
            *value = found.multiProcessorCount;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = found.major;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = found.minor;
            break;
    }
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
