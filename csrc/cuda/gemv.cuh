// Products of FEW rows (kernels.cuh): each weight is read once for up to eight rows, so memory is the limit.
//
// A block computes one panel: 32 rows of a matrix, a lane each. Its groups of lanes (warps) share the columns: warp i
// takes turns i, i + n_warps, … of kTurn groups of 32 columns, which depends on the matrix' shape only, and at the end
// the warps' sums are added in order. So each output is one chain of operations, whatever stands beside it.
//
// As soon as a group is unpacked its registers take that of the warp's next turn, so that 32 to 128 bytes a lane are
// always on their way; those of the first turn are asked for before the kernel waits for its input. Inputs are staged
// in shared memory, some turns of all warps at a time, and read as broadcasts.
#pragma once

#include <type_traits>

#include "cuda/kernels.cuh"
#include "cuda/weights.cuh"

namespace gemmart::gpu {

// The FEW rows of x times products of any formats; does nothing where there are none.
void multiply_few(const Product* products, int n_products, const Rows& x, cudaStream_t stream);

inline constexpr int kMaxProducts = 4;     // of a launch
inline constexpr int kMaxWarps = 16;       // of a block
inline constexpr int kMaxColumns = 8;      // rows of x that are multiplied at once
inline constexpr int kStageBytes = 32768;  // of inputs in shared memory, or what a turn of all warps needs

// As many threads as a multiprocessor shall have at least, which decides how many registers one gets: 64, 80, 96, 128.
constexpr int register_threads(int n, bool two_terms = false) {
    if (n == 1) return 1024;
    if (n < 8) return 768;
    return two_terms ? 512 : 640;
}

// Products of one format with the same inputs.
struct FewJob {
    struct {
        const std::byte* data;
        float* out;
        int ld_out, n_rows;
        int first_panel;  // counted through all products; those that are not there begin behind all blocks
    } products[kMaxProducts];
    int n_units, n_turns;   // of a panel
    int rounds_of_a_stage;  // turns of each warp whose inputs are staged together
    int n_few, n_cols;
    int n_column_groups, column_group;  // rows of x are multiplied in groups of this size
    const int8_t *q, *q_low;
    const float* d;
    const int32_t* sums;
    const float* x;
};

// What a block computes: a panel of a product and some rows of x.
struct FewPlace {
    int product, panel;
    int first, n;  // rows of x
};
static __device__ __forceinline__ FewPlace few_place(const FewJob& job) {
    const int index = blockIdx.x / job.n_column_groups, first = blockIdx.x % job.n_column_groups * job.column_group;
    int product = 0;
#pragma unroll
    for (int i = 1; i < kMaxProducts; ++i) product += index >= job.products[i].first_panel;
    return {product, index - job.products[product].first_panel, first, min(job.column_group, job.n_few - first)};
}
template <typename Block>
static __device__ __forceinline__ const std::byte* few_panel(const FewJob& job, const FewPlace& place) {
    return unit_at<Block>(job.products[place.product].data, job.n_units, place.panel, 0);
}

// Adds the warps' sums in order and stores them. All threads call it; shared [n_warps][kN][32].
template <int kN>
static __device__ __forceinline__ void add_warps(const FewJob& job, const FewPlace& place, const float (&sums)[kN],
                                                 float* shared) {
    const int n_warps = blockDim.x / 32;
    __syncthreads();  // the inputs that stood there have been read
#pragma unroll
    for (int c = 0; c < kN; ++c) shared[(group() * kN + c) * 32 + lane()] = sums[c];
    __syncthreads();
    const auto& product = job.products[place.product];
    const int row = place.panel * kPanel + lane();
    for (int c = group(); c < place.n; c += n_warps) {
        float sum = 0;
        for (int warp = 0; warp < n_warps; ++warp) sum += shared[(warp * kN + c) * 32 + lane()];
        if (row < product.n_rows) product.out[static_cast<size_t>(place.first + c) * product.ld_out + row] = sum;
    }
}

// ---- Kernels for up to n rows, a file for each kind of format (compilers take long).

struct FewKernel {
    void (*kernel)(FewJob);
    int n;             // rows of x that it multiplies, 1, 2, 4 or 8
    int turn_columns;  // of a warp
    int group_bytes;   // of the inputs of 32 columns in shared memory
};
FewKernel few_simple_kernel(DType dtype, int n, bool two_terms);  // integers, blocks of 32
FewKernel few_k_kernel(DType dtype, int n, bool two_terms);       // integers, blocks of 256
FewKernel few_float_kernel(DType dtype, int n);
FewKernel few_block_kernel(DType dtype, int n);

// f(Type<Block>()) with the block of a format that is among these.
template <Kind kKind, int kSize, typename F>
FewKernel with_kind(DType dtype, F f) {
    return with_block(dtype, [&](auto type) -> FewKernel {
        using Block = typename decltype(type)::type;
        if constexpr (Packed<Block>::kKind == kKind && (kSize == 0 || Block::kSize == kSize)) return f(type);
        throw std::logic_error("a kernel of another kind of format was asked for");
    });
}
// f(std::integral_constant<int, N>()) with the number of rows of a kernel.
template <typename F>
FewKernel with_rows(int n, F f) {
    if (n <= 1) return f(std::integral_constant<int, 1>());
    if (n <= 2) return f(std::integral_constant<int, 2>());
    if (n <= 4) return f(std::integral_constant<int, 4>());
    return f(std::integral_constant<int, 8>());
}

}  // namespace gemmart::gpu
