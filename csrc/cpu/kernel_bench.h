// How fast single kernels are, on made-up numbers.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/weights.h"

namespace gemmart::cpu {

// The quickest of several passes.
struct KernelTime {
    double seconds;
    double n_bytes;     // of weights, or of keys and values, that it read
    double n_products;  // multiplications
};

class KernelBench {
  public:
    // n_bytes: of the memory that passes read, at least 1 MiB; more than the caches hold, where reading it is to be
    // measured. Throws std::invalid_argument, OutOfMemory.
    KernelBench(const Kernels& kernels, int n_threads, size_t n_bytes);

    // Weights of a format with n_tokens columns of activations; as many rows as a pass of 50 ms needs.
    KernelTime matmul(DType dtype, int n_tokens);
    // The last n_tokens of 8192 positions, two query rows each, heads of 256.
    KernelTime attention(KvType type, int n_tokens);
    // (name, numbers a second on one thread) of each element-wise kernel, on rows in the cache.
    std::vector<std::pair<std::string, double>> vectors();

  private:
    double best_of_passes(const std::function<void(int)>& work);

    const Kernels& kernels_;
    ThreadPool pool_;
    const size_t n_bytes_;
    Arena arena_;
    std::byte* bytes_;
    std::vector<std::byte*> scratch_;  // a thread
};

}  // namespace gemmart::cpu
