// gemmart_kernel_multiply() of kernel_abi.h.
#include <cmath>
#include <vector>

#include "cuda/kernel_abi.h"
#include "cuda/kernel_tests.cuh"
#include "cuda/kernels.cuh"
#include "cuda/status.cuh"

using namespace gemmart;
using namespace gemmart::gpu;

extern "C" __attribute__((visibility("default"))) int32_t
gemmart_kernel_multiply(uint32_t dtype, int32_t n_rows, int32_t n_cols, const void* w, int32_t n, int32_t n_few,
                        int32_t terms, int32_t own_gemm, const float* x, float* out, int32_t repeats, double* seconds) {
    return guarded([&] {
        const FormatInfo* format = find_format(dtype);
        check<std::invalid_argument>(format, "no such format: ", dtype);
        const size_t n_out = static_cast<size_t>(n) * n_rows;
        const std::vector<float> unwritten(n_out, NAN);  // what is left of it shows

        const DeviceMemory raw = on_device(static_cast<const std::byte*>(w), n_rows * row_bytes(*format, n_cols));
        const DeviceMemory packed(matrix_bytes(format->dtype, n_rows, n_cols), "a test's matrix");
        const Matrix matrix = {format->dtype, n_rows, n_cols, packed.data()};
        const DeviceMemory inputs = on_device(x, static_cast<size_t>(n) * n_cols);
        const DeviceMemory memory(rows_bytes(n, n_cols), "a test's rows");
        Rows rows = rows_at(memory.data(), n, n_few, n_cols);
        if (terms == 1) rows.q_low = nullptr, rows.lo = nullptr;
        const DeviceMemory scratch(multiply_scratch_bytes(matrix, n - n_few), "a test's scratch");
        const DeviceMemory outputs = on_device(unwritten.data(), n_out);
        const Product product = {matrix, outputs.as<float>(), n_rows};

        const TestStream stream;
        pack_rows(matrix, raw.data(), 0, n_rows, stream.get());
        convert_rows(inputs.as<float>(), nullptr, rows, stream.get());
        stream.wait();
        *seconds = stream.seconds_of(repeats,
                                     [&] { multiply(&product, 1, rows, scratch.data(), own_gemm != 0, stream.get()); });
        to_host(out, outputs, n_out);
    });
}
