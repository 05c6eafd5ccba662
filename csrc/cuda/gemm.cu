// Products of MANY rows: which way each goes. Most formats are decoded inside of the product. Those that stand in
// blocks, and all where cuBLAS multiplies, are decoded to bf16 planes in the scratch first, a slice of rows at a time.
//
// What a weight is rounded to: one bf16 where the activations have one term; BF16 is exact in any case, F16 (exact in
// hi + lo) and F32 always have two terms, and all formats do where the activations do.
#include "cuda/gemm.cuh"

#include <algorithm>

#include "cuda/blas.cuh"
#include "cuda/gemm_start.cuh"
#include "cuda/gemv.cuh"

namespace gemmart::gpu {
namespace {

// Weights of a slice: enough blocks for any device, and one term of it stays in the L2 of the largest ones.
constexpr int64_t kSliceWeights = 32 << 20;
constexpr int kSliceRows = 128;  // a slice is a multiple

int slice_rows(const Matrix& w) {
    const int64_t rows = std::max<int64_t>(kSliceWeights / w.n_cols / kSliceRows, 1) * kSliceRows;
    return static_cast<int>(std::min<int64_t>(rows, w.n_rows));
}

bool two_terms(DType dtype, bool precise) {
    return dtype != DType::BF16 && (precise || dtype == DType::F16 || dtype == DType::F32);
}

#ifdef GEMMART_BLAS
constexpr bool kBlas = true;
#else
constexpr bool kBlas = false;
#endif
size_t workspace_bytes() {
    if constexpr (kBlas) return blas_workspace_bytes();
    return 0;
}

// With the library: hi · hi, then what else two terms have, but lo · lo, as our own kernels do.
void multiply_planes(const GemmJob& job, const __nv_bfloat16* hi, const __nv_bfloat16* lo, std::byte* workspace,
                     cudaStream_t stream) {
    const auto add = [&](const __nv_bfloat16* x, const __nv_bfloat16* w, bool to_sum) {
        if constexpr (kBlas)
            if (x && w) blas_multiply(x, w, job.out, job.m, job.n, job.n_cols, job.ld_out, to_sum, workspace, stream);
    };
    add(job.x_hi, hi, false);
    add(job.x_lo, hi, true);
    add(job.x_hi, lo, true);
}

void multiply_many(const Product& product, const Rows& x, std::byte* scratch, bool own_gemm, cudaStream_t stream) {
    const Matrix& w = product.w;
    const size_t many = static_cast<size_t>(x.n_few) * product.ld_out;
    GemmJob job = {x.hi, x.lo, product.out + many, x.n - x.n_few, w.n_rows, w.n_cols, product.ld_out, 0};
    const bool blas = kBlas && !own_gemm;
    if (!blas && has_gemm_panels(w.dtype)) return (x.lo ? gemm_panels_precise : gemm_panels)(job, w, stream);

    const int n = slice_rows(w);
    auto* hi = reinterpret_cast<__nv_bfloat16*>(scratch + workspace_bytes());
    __nv_bfloat16* lo = two_terms(w.dtype, x.lo) ? hi + static_cast<size_t>(n) * w.n_cols : nullptr;
    for (int first = 0; first < w.n_rows; first += n, job.out += n) {
        job.n = std::min(n, w.n_rows - first);
        decode_rows(w, first, job.n, hi, lo, stream);
        if (blas)
            multiply_planes(job, hi, lo, scratch, stream);
        else
            gemm_planes(job, hi, lo, stream);
    }
}

}  // namespace

GemmRoom gemm_room() {
    int device, n_units, bytes;
    check_device(cudaGetDevice(&device), "device");
    check_device(cudaDeviceGetAttribute(&n_units, cudaDevAttrMultiProcessorCount, device), "device");
    check_device(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
    return {n_units, static_cast<size_t>(bytes)};
}

size_t multiply_scratch_bytes(const Matrix& w, int n_many) {
    if (n_many == 0 || (!kBlas && has_gemm_panels(w.dtype))) return 0;
    const int most_terms = two_terms(w.dtype, true) ? 2 : 1;
    return workspace_bytes() + static_cast<size_t>(slice_rows(w)) * w.n_cols * most_terms * sizeof(__nv_bfloat16);
}

void multiply(const Product* products, int n_products, const Rows& x, std::byte* scratch, bool own_gemm,
              cudaStream_t stream) {
    if (x.n_few > 0) multiply_few(products, n_products, x, stream);
    if (x.n == x.n_few) return;
    for (int i = 0; i < n_products; i++) multiply_many(products[i], x, scratch, own_gemm, stream);
}

const char* gemm_name() {
    if constexpr (kBlas) return blas_name();
    return "tinyblas";
}

}  // namespace gemmart::gpu
