#include "emulator/runtime.h"

#include <stdlib.h>
#include <sys/mman.h>

#include <chrono>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "emulator/faults.h"

using Work = std::function<cudaError_t()>;

struct EmulatedGraph {
    std::vector<Work> works;
};
struct EmulatedStream {
    EmulatedGraph* capturing = nullptr;
};
struct EmulatedEvent {
    std::chrono::steady_clock::time_point at;
};

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 256;     // of cudaMalloc
constexpr size_t kShared = 48 * 1024;  // without being asked for
constexpr size_t kMostShared = 227 * 1024;

struct Allocation {
    unsigned char* mapping;
    size_t mapped, bytes;
    int device;
};

std::mutex mutex;
std::map<void*, Allocation> allocations;
std::map<int, size_t> used;  // by device

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string failure;
thread_local int n_capturing = 0;
EmulatedStream default_stream;

cudaError_t keep(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

long long setting(const char* name, long long otherwise) {
    const char* text = getenv(name);
    return text && *text ? strtoll(text, nullptr, 10) : otherwise;
}
size_t total_memory() { return static_cast<size_t>(setting("GEMMART_EMULATED_MEMORY", 1 << 30)); }

EmulatedStream& stream_of(cudaStream_t stream) { return stream ? *stream : default_stream; }

cudaError_t find_device(int device) {
    int n = 0;
    if (const cudaError_t error = cudaGetDeviceCount(&n); error != cudaSuccess) return error;
    return device < 0 || device >= n ? cudaErrorInvalidDevice : cudaSuccess;
}

}  // namespace

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

// ---- devices

cudaError_t cudaGetDeviceCount(int* n) {
    const long long devices = setting("GEMMART_EMULATED_DEVICES", 1);
    *n = devices < 0 ? 0 : static_cast<int>(devices);
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
    found->totalGlobalMem = total_memory();
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
cudaError_t cudaDeviceSynchronize() { return n_capturing ? keep(cudaErrorStreamCaptureUnsupported) : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaMemGetInfo(size_t* n_free, size_t* total) {
    if (const cudaError_t error = find_device(current_device); error != cudaSuccess) return keep(error);
    const std::lock_guard lock(mutex);
    *total = total_memory();
    const size_t taken = used[current_device];
    *n_free = taken < *total ? *total - taken : 0;
    return cudaSuccess;
}

// ---- memory

// Each allocation ends at a page that nobody may touch, as far as its alignment allows, and begins behind one.
cudaError_t cudaMalloc(void** made, size_t bytes) {
    *made = nullptr;
    if (n_capturing) return keep(cudaErrorStreamCaptureUnsupported);
    if (const cudaError_t error = find_device(current_device); error != cudaSuccess) return keep(error);
    if (bytes == 0) return cudaSuccess;
    const std::lock_guard lock(mutex);
    if (bytes > total_memory() || used[current_device] > total_memory() - bytes) return keep(cudaErrorMemoryAllocation);
    const size_t aligned = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const size_t pages = (aligned + kPage - 1) / kPage * kPage;
    void* mapping = mmap(nullptr, pages + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) return keep(cudaErrorMemoryAllocation);
    auto* base = static_cast<unsigned char*>(mapping);
    mprotect(base, kPage, PROT_NONE);
    mprotect(base + kPage + pages, kPage, PROT_NONE);
    memset(base + kPage, 0xff, pages);  // NaN, where nobody wrote
    *made = base + kPage + pages - aligned;
    allocations[*made] = {base, pages + 2 * kPage, bytes, current_device};
    used[current_device] += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
    if (!memory) return cudaSuccess;
    if (n_capturing) return keep(cudaErrorStreamCaptureUnsupported);
    const std::lock_guard lock(mutex);
    const auto found = allocations.find(memory);
    if (found == allocations.end()) return keep(cudaErrorInvalidValue);
    munmap(found->second.mapping, found->second.mapped);
    used[found->second.device] -= found->second.bytes;
    allocations.erase(found);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** made, size_t bytes) {
    *made = malloc(bytes ? bytes : 1);
    return keep(*made ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* memory) {
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    return gemmart::emulator::submit(stream, [=] {
        if (bytes) memmove(to, from, bytes);
        return cudaSuccess;
    });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
    return gemmart::emulator::submit(stream, [=] {
        for (size_t i = 0; i < height; i++) {
            memmove(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
        }
        return cudaSuccess;
    });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    return gemmart::emulator::submit(stream, [=] {
        if (bytes) memset(to, value, bytes);
        return cudaSuccess;
    });
}

// ---- streams, events, graphs

cudaError_t cudaStreamCreate(cudaStream_t* made) { return cudaStreamCreateWithFlags(made, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned) {
    *made = nullptr;
    if (const cudaError_t error = find_device(current_device); error != cudaSuccess) return keep(error);
    *made = new EmulatedStream;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return stream_of(stream).capturing ? keep(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaEventCreate(cudaEvent_t* made) { return cudaEventCreateWithFlags(made, 0); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned) {
    *made = new EmulatedEvent;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return gemmart::emulator::submit(stream, [=] {
        event->at = std::chrono::steady_clock::now();
        return cudaSuccess;
    });
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (!stream || stream->capturing) return keep(cudaErrorStreamCaptureUnsupported);
    stream->capturing = new EmulatedGraph;
    n_capturing++;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* made) {
    *made = nullptr;
    if (!stream || !stream->capturing) return keep(cudaErrorInvalidValue);
    *made = stream->capturing;
    stream->capturing = nullptr;
    n_capturing--;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
    *made = new EmulatedGraph(*graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    for (const Work& work : graph->works) {
        if (const cudaError_t error = gemmart::emulator::submit(stream, work); error != cudaSuccess) return error;
    }
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaGraphDestroy(graph); }

namespace gemmart::emulator {

std::string describe_address(const void* address) {
    const auto* at = static_cast<const unsigned char*>(address);
    std::ostringstream out;
    out << address;
    if (at < reinterpret_cast<const unsigned char*>(kPage)) out << ", by a null pointer";
    for (const auto& [begin, allocation] : allocations) {
        const auto* first = static_cast<const unsigned char*>(begin);
        const unsigned char* end = first + allocation.bytes;
        if (at >= end && at < allocation.mapping + allocation.mapped) {
            out << ", " << at - end << " bytes behind the end of " << allocation.bytes;
        }
        if (at >= allocation.mapping && at < first) {
            out << ", " << first - at << " bytes before the begin of " << allocation.bytes;
        }
    }
    return out.str();
}

cudaError_t submit(cudaStream_t stream, Work work) {
    EmulatedStream& to = stream_of(stream);
    if (to.capturing) {
        to.capturing->works.push_back(std::move(work));
        return cudaSuccess;
    }
    return keep(work());
}

cudaError_t submit_kernel(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                          std::function<void()> kernel) {
    const unsigned long long n_threads = 1ull * block.x * block.y * block.z;
    if (n_threads == 0 || n_threads > 1024 || 1ull * grid.x * grid.y * grid.z == 0 || grid.y > 65535 ||
        grid.z > 65535) {
        return keep(cudaErrorInvalidConfiguration);
    }
    if (shared_bytes > kMostShared) return keep(cudaErrorInvalidValue);
    return submit(stream, [=, kernel = std::move(kernel)] {
        std::string reason = run_grid(grid, block, shared_bytes, kernel);
        if (reason.empty()) return cudaSuccess;
        failure = std::move(reason);
        return cudaErrorLaunchFailure;
    });
}

}  // namespace gemmart::emulator
