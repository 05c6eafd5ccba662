// The libraries count columns first: our out [m, n] is their n × m, x is k × m, w is k × n and transposed.
#ifdef GEMMART_BLAS

#include "cuda/device.cuh"
// hipblas.h last: it looks at what the HIP headers have defined
#if GEMMART_HIP
#define HIPBLAS_V2  // types of their own for what is computed with, since hipBLAS 2
#include <hipblas/hipblas.h>
#else
#include <cublas_v2.h>
#endif

#include <map>
#include <mutex>

#include "cuda/blas.cuh"
#include "error.h"

namespace gemmart::gpu {
namespace {

#if GEMMART_HIP
using Handle = hipblasHandle_t;
constexpr const char* kName = "hipblas";
constexpr size_t kWorkspace = 0;  // rocBLAS keeps its own

void check_blas(hipblasStatus_t status, const char* what) {
    check<DeviceError>(status == HIPBLAS_STATUS_SUCCESS, what, ": hipBLAS status ", static_cast<int>(status));
}

Handle new_handle() {
    Handle handle;
    check_blas(hipblasCreate(&handle), "hipblasCreate");
    return handle;
}

void gemm(Handle handle, const __nv_bfloat16* x, const __nv_bfloat16* w, float* out, int m, int n, int k, int ld_out,
          const float* beta, std::byte*, cudaStream_t stream) {
#if hipblasVersionMajor >= 2
    constexpr auto kBf16 = HIP_R_16BF;
    constexpr auto kFloat = HIP_R_32F;
    constexpr auto kCompute = HIPBLAS_COMPUTE_32F;
#else
    constexpr auto kBf16 = HIPBLAS_R_16B;
    constexpr auto kFloat = HIPBLAS_R_32F, kCompute = HIPBLAS_R_32F;
#endif
    const float one = 1;
    check_blas(hipblasSetStream(handle, stream), "hipblasSetStream");
    check_blas(hipblasGemmEx(handle, HIPBLAS_OP_T, HIPBLAS_OP_N, n, m, k, &one, w, kBf16, k, x, kBf16, k, beta, out,
                             kFloat, ld_out, kCompute, HIPBLAS_GEMM_DEFAULT),
               "hipblasGemmEx");
}
#else
using Handle = cublasHandle_t;
constexpr const char* kName = "cublas";
constexpr size_t kWorkspace = 32 << 20;  // what cuBLAS advises for Hopper

void check_blas(cublasStatus_t status, const char* what) {
    check<DeviceError>(status == CUBLAS_STATUS_SUCCESS, what, ": ", cublasGetStatusString(status));
}

Handle new_handle() {
    Handle handle;
    check_blas(cublasCreate(&handle), "cublasCreate");
    return handle;
}

void gemm(Handle handle, const __nv_bfloat16* x, const __nv_bfloat16* w, float* out, int m, int n, int k, int ld_out,
          const float* beta, std::byte* workspace, cudaStream_t stream) {
    const float one = 1;
    check_blas(cublasSetStream(handle, stream), "cublasSetStream");  // before the workspace, which it resets
    check_blas(cublasSetWorkspace(handle, workspace, kWorkspace), "cublasSetWorkspace");
    check_blas(cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, n, m, k, &one, w, CUDA_R_16BF, k, x, CUDA_R_16BF, k, beta,
                            out, CUDA_R_32F, ld_out, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
               "cublasGemmEx");
}
#endif

}  // namespace

const char* blas_name() { return kName; }
size_t blas_workspace_bytes() { return kWorkspace; }

void blas_multiply(const __nv_bfloat16* x, const __nv_bfloat16* w, float* out, int m, int n, int k, int ld_out,
                   bool add, std::byte* workspace, cudaStream_t stream) {
    // A handle belongs to a device, and one thread uses it at a time; none is given back before the process ends.
    static std::mutex mutex;
    static std::map<int, Handle> handles;
    int device;
    check_device(cudaGetDevice(&device), "cudaGetDevice");
    const std::lock_guard lock(mutex);
    auto found = handles.find(device);
    if (found == handles.end()) found = handles.emplace(device, new_handle()).first;
    const float beta = add ? 1 : 0;
    gemm(found->second, x, w, out, m, n, k, ld_out, &beta, workspace, stream);
}

}  // namespace gemmart::gpu

#endif
