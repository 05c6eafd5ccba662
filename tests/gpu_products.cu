// What kernel_abi.h does not reach of weights and few rows, called by test_gpu_products.py under the emulator.
#include <vector>

#include "cuda/gemv.cuh"
#include "cuda/kernel_tests.cuh"
#include "cuda/status.cuh"

#define GEMMART_EXPORT extern "C" __attribute__((visibility("default")))

namespace gemmart::gpu {
namespace {

DType dtype_of(uint32_t id) {
    const FormatInfo* format = find_format(id);
    check<std::invalid_argument>(format, "no such format: ", id);
    return format->dtype;
}

// One group of lanes a panel.
template <typename Block>
__global__ void decode_kernel(Matrix w, float* out) {
    wait_for_previous();
    const int row = blockIdx.x * kPanel + lane();
    for (int g = 0; g < w.n_cols / kGroup; ++g) {
        float x[32];
        decode32<Block>(unit_at<Block>(w.data, units_of(w.n_cols), blockIdx.x, g / 8), lane(), g % 8, x);
        for (int k = 0; k < 32; ++k) out[static_cast<size_t>(row) * w.n_cols + g * 32 + k] = x[k];
    }
}

// A matrix on the device; its memory is full of other bits before.
struct PackedMatrix {
    DeviceMemory raw, memory;
    Matrix w;

    PackedMatrix(uint32_t id, int n_rows, int n_cols, const std::byte* bytes, int rows_at_once)
        : raw(on_device(bytes, n_rows * row_bytes(format_of(dtype_of(id)), n_cols))),
          memory(matrix_bytes(dtype_of(id), n_rows, n_cols), "a test's matrix"),
          w{dtype_of(id), n_rows, n_cols, memory.data()} {
        check_device(cudaMemset(memory.data(), 0x5a, memory.size()), "memset");
        const size_t bytes_of_row = row_bytes(format_of(w.dtype), n_cols);
        for (int row = 0; row < n_rows; row += rows_at_once)
            pack_rows(w, raw.data() + row * bytes_of_row, row, std::min(rows_at_once, n_rows - row), nullptr);
    }
};

}  // namespace

GEMMART_EXPORT const char* products_failure() { return last_error().c_str(); }

// Packed rows_at_once at a time, decoded to out [whole panels, n_cols]; n_bytes: that the matrix takes.
GEMMART_EXPORT int products_decode(uint32_t id, int n_rows, int n_cols, const void* bytes, int rows_at_once, float* out,
                                   size_t* n_bytes) {
    return guarded([&] {
        const PackedMatrix matrix(id, n_rows, n_cols, static_cast<const std::byte*>(bytes), rows_at_once);
        const int n_panels = (n_rows + kPanel - 1) / kPanel;
        const size_t n = static_cast<size_t>(n_panels) * kPanel * n_cols;
        const DeviceMemory decoded(n * sizeof(float), "a test's weights");
        with_block(matrix.w.dtype, [&](auto type) {
            launch(decode_kernel<typename decltype(type)::type>, dim3(n_panels), dim3(32), 0, nullptr, matrix.w,
                   decoded.as<float>());
        });
        check_device(cudaDeviceSynchronize(), "kernels");
        to_host(out, decoded, n);
        *n_bytes = matrix.memory.size();
    });
}

// Several products of the same x [n, n_cols] at once; outs[i] [n, ld_out].
GEMMART_EXPORT int products_multiply(int n_products, const uint32_t* ids, const int* n_rows, int n_cols,
                                     const void* const* bytes, int n, int terms, const float* x, int ld_out,
                                     float* const* outs) {
    return guarded([&] {
        const DeviceMemory inputs = on_device(x, static_cast<size_t>(n) * n_cols);
        const DeviceMemory memory(rows_bytes(n, n_cols), "a test's rows");
        Rows rows = rows_at(memory.data(), n, n, n_cols);
        if (terms == 1) rows.q_low = nullptr;
        convert_rows(inputs.as<float>(), nullptr, rows, nullptr);
        std::vector<PackedMatrix> matrices;
        std::vector<DeviceMemory> memories;
        std::vector<Product> products;
        for (int i = 0; i < n_products; ++i) {
            matrices.emplace_back(ids[i], n_rows[i], n_cols, static_cast<const std::byte*>(bytes[i]), n_rows[i]);
            memories.push_back(on_device(outs[i], static_cast<size_t>(n) * ld_out));
            products.push_back({matrices.back().w, memories.back().as<float>(), ld_out});
        }
        multiply_few(products.data(), n_products, rows, nullptr);
        check_device(cudaDeviceSynchronize(), "kernels");
        for (int i = 0; i < n_products; ++i) to_host(outs[i], memories[i], static_cast<size_t>(n) * ld_out);
    });
}

// norm_rows() of rows `chosen` [n] of residual [n_residual, dim]; norm null: states stay as they are.
GEMMART_EXPORT int products_norm(int n_residual, int n, int dim, float* residual, const int32_t* chosen,
                                 const float* proj, const float* norm, float* states) {
    return guarded([&] {
        const size_t n_stream = static_cast<size_t>(n_residual) * dim, n_numbers = static_cast<size_t>(n) * dim;
        const DeviceMemory stream = on_device(residual, n_stream), added = on_device(proj, n_numbers);
        const DeviceMemory rows = on_device(chosen, n), normed = on_device(states, n_numbers);
        const DeviceMemory weight = norm ? on_device(norm, dim) : DeviceMemory();
        const DeviceMemory memory(rows_bytes(n, dim), "a test's rows");
        norm_rows({dim, 1e-6f, stream.as<float>(), rows.as<int32_t>(), added.as<float>(), nullptr, weight.as<float>(),
                   normed.as<float>()},
                  rows_at(memory.data(), n, n, dim), nullptr);
        check_device(cudaDeviceSynchronize(), "kernels");
        to_host(residual, stream, n_stream);
        to_host(states, normed, n_numbers);
    });
}

// x [.., n_cols] at rows `chosen` [n], as few rows see it: out [n, n_cols].
GEMMART_EXPORT int products_convert(int n_x, int n, int n_cols, const float* x, const int32_t* chosen, float* out) {
    return guarded([&] {
        const DeviceMemory inputs = on_device(x, static_cast<size_t>(n_x) * n_cols), rows = on_device(chosen, n);
        const DeviceMemory memory(rows_bytes(n, n_cols), "a test's rows");
        const Rows to = rows_at(memory.data(), n, n, n_cols);
        convert_rows(inputs.as<float>(), rows.as<int32_t>(), to, nullptr);
        check_device(cudaDeviceSynchronize(), "kernels");
        const size_t n_bytes = static_cast<size_t>(n) * n_cols * sizeof(float);
        check_device(cudaMemcpy(out, to.x, n_bytes, cudaMemcpyDeviceToHost), "copy from the device");
    });
}

}  // namespace gemmart::gpu
