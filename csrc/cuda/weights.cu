#include "cuda/weights.cuh"

#include "cuda/kernels.cuh"

namespace gemmart::gpu {
namespace {

constexpr int kWarps = 4;

// One lane a row, one group of lanes a unit. Rows from n_rows on are zeros.
template <typename Block>
__global__ void __launch_bounds__(32 * kWarps)
    pack(const std::byte* raw, int n_rows, int n_blocks, int n_units, int n_panels, std::byte* to) {
    wait_for_previous();
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + group();
    const int unit = static_cast<int>(at % n_units), panel = static_cast<int>(at / n_units);
    if (panel >= n_panels) return;
    const int row = panel * kPanel + lane(), first = unit * (kUnit / Block::kSize);
    const auto* blocks = reinterpret_cast<const Block*>(raw) + static_cast<size_t>(row) * n_blocks + first;
    const int left = n_blocks - first, whole = kUnit / Block::kSize;
    const int n = row >= n_rows ? 0 : left < whole ? left : whole;
    Packed<Block>::pack(blocks, n, to + at * (kPanel * Packed<Block>::kLaneBytes), lane());
}

}  // namespace

size_t matrix_bytes(DType dtype, int n_rows, int n_cols) {
    const size_t units = static_cast<size_t>((n_rows + kPanel - 1) / kPanel) * units_of(n_cols);
    return with_block(dtype,
                      [&](auto type) { return units * kPanel * Packed<typename decltype(type)::type>::kLaneBytes; });
}

void pack_rows(const Matrix& w, const std::byte* raw, int first_row, int n_rows, cudaStream_t stream) {
    if (n_rows == 0) return;
    with_block(w.dtype, [&](auto type) {
        using Block = typename decltype(type)::type;
        static_assert(Packed<Block>::kLaneBytes == kUnit / Block::kSize * sizeof(Block));
        const int n_units = units_of(w.n_cols), n_panels = (n_rows + kPanel - 1) / kPanel;
        const int64_t n = static_cast<int64_t>(n_units) * n_panels;
        std::byte* to = w.data + static_cast<size_t>(first_row / kPanel) * n_units * kPanel * Packed<Block>::kLaneBytes;
        launch(pack<Block>, dim3(static_cast<unsigned>((n + kWarps - 1) / kWarps)), dim3(32 * kWarps), 0, stream, raw,
               n_rows, w.n_cols / Block::kSize, n_units, n_panels, to);
    });
}

}  // namespace gemmart::gpu
