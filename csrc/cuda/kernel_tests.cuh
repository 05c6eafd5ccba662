// What the functions of kernel_abi.h share: arrays of the host on the device, and time.
#pragma once

#include "cuda/memory.cuh"

namespace gemmart::gpu {

// n numbers from the host, on the device.
template <typename T>
DeviceMemory on_device(const T* from, size_t n) {
    DeviceMemory memory(n * sizeof(T), "a test's array");
    check_device(cudaMemcpy(memory.data(), from, n * sizeof(T), cudaMemcpyHostToDevice), "copy to the device");
    return memory;
}
template <typename T>
void to_host(T* to, const DeviceMemory& from, size_t n) {
    check_device(cudaMemcpy(to, from.data(), n * sizeof(T), cudaMemcpyDeviceToHost), "copy from the device");
}

class TestStream {
  public:
    TestStream() {
        check_device(cudaStreamCreate(&stream_), "stream");
        check_device(cudaEventCreate(&begin_), "event");
        check_device(cudaEventCreate(&end_), "event");
    }
    ~TestStream() {
        cudaEventDestroy(end_);
        cudaEventDestroy(begin_);
        cudaStreamDestroy(stream_);
    }
    TestStream(const TestStream&) = delete;
    TestStream& operator=(const TestStream&) = delete;

    cudaStream_t get() const { return stream_; }
    void wait() const { check_device(cudaStreamSynchronize(stream_), "kernels"); }
    // Of f, which starts kernels on the stream, called `repeats` times.
    template <typename F>
    double seconds_of(int repeats, F f) const {
        check_device(cudaEventRecord(begin_, stream_), "event");
        for (int i = 0; i < repeats; i++) f();
        check_device(cudaEventRecord(end_, stream_), "event");
        wait();
        float milliseconds;
        check_device(cudaEventElapsedTime(&milliseconds, begin_, end_), "time");
        return milliseconds * 1e-3;
    }

  private:
    cudaStream_t stream_ = nullptr;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace gemmart::gpu
