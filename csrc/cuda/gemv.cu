#include "cuda/gemv.cuh"

#include <algorithm>
#include <climits>
#include <vector>

namespace gemmart::gpu {
namespace {

FewKernel few_kernel(DType dtype, int n, bool two_terms) {
    return with_block(dtype, [&](auto type) {
        using Block = typename decltype(type)::type;
        constexpr Kind kKind = Packed<Block>::kKind;
        if constexpr (kKind == Kind::Floats) return few_float_kernel(dtype, n);
        if constexpr (kKind == Kind::Blocks) return few_block_kernel(dtype, n);
        return Block::kSize == 32 ? few_simple_kernel(dtype, n, two_terms) : few_k_kernel(dtype, n, two_terms);
    });
}

int up(int n, int by) { return (n + by - 1) / by; }

// Products of one format.
void multiply_alike(const Product* const* products, int n_products, const Rows& x, cudaStream_t stream) {
    FewJob job = {};
    job.n_column_groups = up(x.n_few, kMaxColumns);
    job.column_group = up(x.n_few, job.n_column_groups);
    const FewKernel kernel = few_kernel(products[0]->w.dtype, job.column_group, x.q_low != nullptr);
    int n_panels = 0;
    for (int i = 0; i < kMaxProducts; ++i) {
        job.products[i].first_panel = i < n_products ? n_panels : INT_MAX;
        if (i >= n_products) continue;
        const Product& product = *products[i];
        job.products[i].data = product.w.data;
        job.products[i].out = product.out;
        job.products[i].ld_out = product.ld_out;
        job.products[i].n_rows = product.w.n_rows;
        n_panels += up(product.w.n_rows, kPanel);
    }
    job.n_units = units_of(x.n_cols);
    job.n_turns = up(x.n_cols, kernel.turn_columns);
    job.n_few = x.n_few, job.n_cols = x.n_cols;
    job.q = x.q, job.q_low = x.q_low, job.d = x.d, job.sums = x.sums, job.x = x.x;

    // Decided by n_cols and the format alone, since the order of sums depends on it; at most one warp a turn.
    const int n_rounds = up(job.n_turns, kMaxWarps), n_warps = up(job.n_turns, n_rounds);
    const int round_bytes = n_warps * (kernel.turn_columns / kGroup) * kernel.group_bytes;
    job.rounds_of_a_stage = round_bytes == 0 ? n_rounds : std::clamp(kStageBytes / round_bytes, 1, n_rounds);
    const int shared_bytes =
        std::max(job.rounds_of_a_stage * round_bytes, n_warps * kernel.n * kPanel * static_cast<int>(sizeof(float)));
    launch(kernel.kernel, dim3(n_panels * job.n_column_groups), dim3(n_warps * 32), shared_bytes, stream, job);
}

}  // namespace

void multiply_few(const Product* products, int n_products, const Rows& x, cudaStream_t stream) {
    if (x.n_few == 0) return;
    std::vector<const Product*> left;
    for (int i = 0; i < n_products; ++i) left.push_back(products + i);
    while (!left.empty()) {
        const Product* alike[kMaxProducts];
        int n = 0;
        for (auto at = left.begin(); at != left.end() && n < kMaxProducts;) {
            if (n == 0 || (*at)->w.dtype == alike[0]->w.dtype)
                alike[n++] = *at, at = left.erase(at);
            else
                ++at;
        }
        multiply_alike(alike, n, x, stream);
    }
}

}  // namespace gemmart::gpu
