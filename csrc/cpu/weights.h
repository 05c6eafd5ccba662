// The weights of a CPU executor: read from the file once, in parallel, straight into panels in one huge-page arena.
#pragma once

#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "gguf.h"

namespace gemmart::cpu {

// Anonymous memory on huge pages where the system grants them: a guest's 4 KiB pages read at half the speed.
class Arena {
  public:
    explicit Arena(size_t n_bytes);  // throws OutOfMemory
    ~Arena();
    Arena(const Arena&) = delete;
    std::byte* take(size_t n_bytes);  // 64-byte aligned; all takes together at most n_bytes, each rounded up to 64

  private:
    std::byte* base_;
    size_t size_, used_ = 0;
};

// Bytes that a matrix takes in the arena.
size_t arena_bytes(const Tensor& tensor);

struct LoadItem {
    const Tensor* tensor;  // two dimensions
    Matrix* to;
};

// Fills `items` from the file into `arena`.
void load_matrices(const GgufFile& file, const std::vector<LoadItem>& items, Arena& arena, ThreadPool& pool);

// A tensor of one dimension as floats.
std::vector<float> load_vector(const GgufFile& file, const Tensor& tensor);

}  // namespace gemmart::cpu
