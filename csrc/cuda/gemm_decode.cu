// Weights as bf16 planes, for formats and libraries whose products want them so.
#include "cuda/gemm.cuh"
#include "cuda/gemm_sources.cuh"

namespace gemmart::gpu {
namespace {

constexpr int kThreads = 128;

// What a thread decodes: a group, or a whole block, of which a part costs as much.
template <typename Block>
constexpr int kDecoded = Packed<Block>::kKind == Kind::Blocks && Block::kSize > kGroup ? Block::kSize : kGroup;

// Lanes are rows, as the panels have it. blockIdx.x: a panel; blockIdx.y: some of its columns.
template <typename Block, bool kLow>
__global__ void __launch_bounds__(kThreads)
    decode_panels(PanelsView w, int first_row, int n_rows, __nv_bfloat16* hi, __nv_bfloat16* lo) {
    constexpr int kColumns = kDecoded<Block>;
    wait_for_previous();
    const int panel = blockIdx.x, col = (blockIdx.y * (kThreads / kPanel) + group()) * kColumns;
    const int row = panel * kPanel + lane();  // of those that are wanted
    if (col >= w.n_cols || row >= n_rows) return;
    const std::byte* unit = unit_at<Block>(w.data, w.n_units, first_row / kPanel + panel, col / kUnit);
    float x[kColumns];
    if constexpr (kColumns == kGroup)
        decode32<Block>(unit, lane(), col % kUnit / kGroup, x);
    else
        decode(Packed<Block>::block(unit, lane(), col % kUnit / kColumns), x);
    const size_t at = static_cast<size_t>(row) * w.n_cols + col;
#pragma unroll 4
    for (int i = 0; i < kColumns; i += 8) {
        const uint4 rounded = round_eight(x + i);
        *reinterpret_cast<uint4*>(hi + at + i) = rounded;
        if constexpr (kLow) {
            subtract_eight(x + i, rounded);
            *reinterpret_cast<uint4*>(lo + at + i) = round_eight(x + i);
        }
    }
}

}  // namespace

void decode_rows(const Matrix& w, int first_row, int n_rows, __nv_bfloat16* hi, __nv_bfloat16* lo,
                 cudaStream_t stream) {
    const PanelsView view = {w.data, (w.n_rows + kPanel - 1) / kPanel, units_of(w.n_cols), w.n_cols};
    with_block(w.dtype, [&](auto type) {
        using Block = typename decltype(type)::type;
        constexpr int kColumns = kDecoded<Block> * (kThreads / kPanel);
        const dim3 grid((n_rows + kPanel - 1) / kPanel, (w.n_cols + kColumns - 1) / kColumns);
        if (lo)
            launch(decode_panels<Block, true>, grid, dim3(kThreads), 0, stream, view, first_row, n_rows, hi, lo);
        else
            launch(decode_panels<Block, false>, grid, dim3(kThreads), 0, stream, view, first_row, n_rows, hi, lo);
    });
}

}  // namespace gemmart::gpu
