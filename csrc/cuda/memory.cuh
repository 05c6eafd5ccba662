// Memory of the device and of the host that a C++ object owns.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include "cuda/device.cuh"

namespace gemmart::gpu {

// Whether it lies on the device, or on the host where the device can fetch it.
enum class Where { Device, Pinned };

template <Where where>
class Memory {
  public:
    Memory() = default;
    // what: for the message of OutOfMemory.
    Memory(size_t n_bytes, const char* what) : n_bytes_(n_bytes) {
        if (n_bytes == 0) return;
        void* made = nullptr;
        const cudaError_t error = where == Where::Device ? cudaMalloc(&made, n_bytes) : cudaMallocHost(&made, n_bytes);
        check_device(error, message(n_bytes, " bytes for ", what).c_str());
        data_ = static_cast<std::byte*>(made);
    }
    Memory(Memory&& other) noexcept { swap(other); }
    Memory& operator=(Memory&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Memory() {
        if (!data_) return;  // freeing nothing would still take memory of the present device for a context
        if (where == Where::Device)
            cudaFree(data_);
        else
            cudaFreeHost(data_);
    }

    std::byte* data() const { return data_; }
    size_t size() const { return n_bytes_; }
    template <typename T>
    T* as(size_t offset = 0) const {
        return reinterpret_cast<T*>(data_ + offset);
    }
    // Room for n_bytes; what was in it is lost where there was less. True if it has moved.
    bool grow(size_t n_bytes, const char* what) {
        if (n_bytes <= n_bytes_) return false;
        *this = Memory();  // the old room first
        *this = Memory(n_bytes, what);
        return true;
    }

  private:
    void swap(Memory& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(n_bytes_, other.n_bytes_);
    }

    std::byte* data_ = nullptr;
    size_t n_bytes_ = 0;
};
using DeviceMemory = Memory<Where::Device>;
using PinnedMemory = Memory<Where::Pinned>;

}  // namespace gemmart::gpu
