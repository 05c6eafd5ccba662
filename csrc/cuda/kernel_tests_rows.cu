// gemmart_kernel_norm() and gemmart_kernel_gate() of kernel_abi.h.
#include <cstring>
#include <type_traits>
#include <vector>

#include "cuda/kernel_abi.h"
#include "cuda/kernel_tests.cuh"
#include "cuda/kernels.cuh"
#include "cuda/status.cuh"

#define GEMMART_EXPORT extern "C" __attribute__((visibility("default")))

namespace gemmart::gpu {
namespace {

float from_bfloat16(const std::byte* at) {
    uint16_t bits;
    std::memcpy(&bits, at, sizeof bits);
    const uint32_t upper = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &upper, sizeof x);
    return x;
}

// Rows on the device, and what their forms say.
class TestRows {
  public:
    TestRows(int n, int n_few, int n_cols, int terms)
        : memory_(rows_bytes(n, n_cols), "a test's rows"), rows(rows_at(memory_.data(), n, n_few, n_cols)) {
        if (terms == 1) rows.q_low = nullptr, rows.lo = nullptr;
    }
    void rounded(float* to) const {
        std::vector<std::byte> copy(memory_.size());
        to_host(copy.data(), memory_, copy.size());
        const auto of = [&](const auto* at) {
            using T = std::remove_reference_t<decltype(*at)>;
            return at ? reinterpret_cast<T*>(copy.data() + (reinterpret_cast<const std::byte*>(at) - memory_.data()))
                      : nullptr;
        };
        const auto *q = of(rows.q), *q_low = of(rows.q_low);
        const auto* d = of(rows.d);
        const size_t n_few = static_cast<size_t>(rows.n_few) * rows.n_cols;
        const size_t n_many = static_cast<size_t>(rows.n) * rows.n_cols - n_few;
        for (size_t i = 0; i < n_few; ++i)
            to[i] = d[i / kGroup] * static_cast<float>(q_low ? 256 * q[i] + q_low[i] : q[i]);
        const auto* hi = reinterpret_cast<const std::byte*>(of(rows.hi));
        const auto* lo = reinterpret_cast<const std::byte*>(of(rows.lo));
        for (size_t i = 0; i < n_many; ++i)
            to[n_few + i] = from_bfloat16(hi + 2 * i) + (lo ? from_bfloat16(lo + 2 * i) : 0);
    }

  private:
    DeviceMemory memory_;

  public:
    Rows rows;
};

// Null stays null.
DeviceMemory optional(const float* from, size_t n) { return from ? on_device(from, n) : DeviceMemory(); }

}  // namespace

GEMMART_EXPORT int32_t gemmart_kernel_norm(int32_t n, int32_t n_few, int32_t dim, float eps, float* residual,
                                           const float* proj, const float* post_norm, const float* norm, int32_t terms,
                                           float* states, float* rounded) {
    return guarded([&] {
        const size_t n_numbers = static_cast<size_t>(n) * dim;
        const DeviceMemory stream_of = on_device(residual, n_numbers), added = optional(proj, n_numbers);
        const DeviceMemory post = optional(post_norm, dim), weight = on_device(norm, dim);
        const DeviceMemory normed(n_numbers * sizeof(float), "a test's states");
        const TestRows to(n, n_few, dim, terms);
        const TestStream stream;
        norm_rows({dim, eps, stream_of.as<float>(), nullptr, added.as<float>(), post.as<float>(), weight.as<float>(),
                   normed.as<float>()},
                  to.rows, stream.get());
        stream.wait();
        to_host(residual, stream_of, n_numbers);
        to_host(states, normed, n_numbers);
        to.rounded(rounded);
    });
}

GEMMART_EXPORT int32_t gemmart_kernel_gate(int32_t silu, int32_t n, int32_t n_few, int32_t n_cols, const float* gate,
                                           const float* up, int32_t terms, float* rounded) {
    return guarded([&] {
        const size_t n_numbers = static_cast<size_t>(n) * n_cols;
        const DeviceMemory gates = on_device(gate, n_numbers), ups = on_device(up, n_numbers);
        const TestRows to(n, n_few, n_cols, terms);
        const TestStream stream;
        gate_rows(silu ? Activation::Silu : Activation::Gelu, gates.as<float>(), ups.as<float>(), to.rows,
                  stream.get());
        stream.wait();
        to.rounded(rounded);
    });
}

}  // namespace gemmart::gpu
