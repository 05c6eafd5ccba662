#include <stdlib.h>
#include <sys/mman.h>

#include <map>
#include <mutex>
#include <sstream>

#include "emulator/faults.h"
#include "emulator/state.h"

using namespace gemmart::emulator;

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 256;  // of cudaMalloc

struct Allocation {
    unsigned char* mapping;
    size_t mapped, bytes;
    int device;
};

std::mutex mutex;
std::map<const void*, Allocation> allocations;
std::map<const void*, size_t> pinned;
std::map<int, size_t> used;  // by device

// The last one that begins at `memory` or before.
template <typename Map>
auto find_before(Map& map, const void* memory) {
    auto found = map.upper_bound(memory);
    return found == map.begin() ? map.end() : --found;
}

}  // namespace

cudaError_t cudaMemGetInfo(size_t* n_free, size_t* total) {
    if (const cudaError_t error = find_device(device_now()); error != cudaSuccess) return keep(error);
    const std::lock_guard lock(mutex);
    *total = device_memory();
    const size_t taken = used[device_now()];
    *n_free = taken < *total ? *total - taken : 0;
    return cudaSuccess;
}

// Each allocation ends at a page that nobody may touch, as far as its alignment allows, and begins behind one.
cudaError_t cudaMalloc(void** made, size_t bytes) {
    *made = nullptr;
    if (is_capturing()) return keep(cudaErrorStreamCaptureUnsupported);
    if (const cudaError_t error = find_device(device_now()); error != cudaSuccess) return keep(error);
    if (bytes == 0) return cudaSuccess;
    const std::lock_guard lock(mutex);
    size_t& taken = used[device_now()];
    if (bytes > device_memory() || taken > device_memory() - bytes) return keep(cudaErrorMemoryAllocation);
    const size_t aligned = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const size_t pages = (aligned + kPage - 1) / kPage * kPage;
    void* mapping = mmap(nullptr, pages + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) return keep(cudaErrorMemoryAllocation);
    auto* base = static_cast<unsigned char*>(mapping);
    mprotect(base, kPage, PROT_NONE);
    mprotect(base + kPage + pages, kPage, PROT_NONE);
    memset(base + kPage, 0xff, pages);  // NaN, where nobody wrote
    *made = base + kPage + pages - aligned;
    allocations[*made] = {base, pages + 2 * kPage, bytes, device_now()};
    taken += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
    if (!memory) return cudaSuccess;
    if (is_capturing()) return keep(cudaErrorStreamCaptureUnsupported);
    run_all_streams();
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
    if (!*made) return keep(cudaErrorMemoryAllocation);
    const std::lock_guard lock(mutex);
    pinned[*made] = bytes;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
    if (!memory) return cudaSuccess;
    run_all_streams();
    const std::lock_guard lock(mutex);
    if (pinned.erase(memory) == 0) return keep(cudaErrorInvalidValue);
    free(memory);
    return cudaSuccess;
}

namespace gemmart::emulator {

bool is_pinned(const void* memory) {
    const std::lock_guard lock(mutex);
    const auto found = find_before(pinned, memory);
    return found != pinned.end() && memory < static_cast<const char*>(found->first) + found->second;
}
bool is_device(const void* memory) {
    const std::lock_guard lock(mutex);
    const auto found = find_before(allocations, memory);
    return found != allocations.end() && memory < static_cast<const char*>(found->first) + found->second.bytes;
}

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

}  // namespace gemmart::emulator
