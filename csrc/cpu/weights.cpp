#include "cpu/weights.h"

#include <sys/mman.h>

#include <algorithm>

#include "error.h"

namespace gemmart::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kPiece = 2 << 20;  // bytes of the file that a thread reads and packs at a time

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

Arena::Arena(size_t n_bytes) : size_(round_up(std::max<size_t>(n_bytes, 1), kHugePage)) {
    void* at =
        mmap(nullptr, size_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check<OutOfMemory>(at != MAP_FAILED, "no address space for ", size_, " bytes of weights");
    // Trim to huge-page alignment.
    auto* begin = static_cast<std::byte*>(at);
    const size_t skip = round_up(reinterpret_cast<uintptr_t>(begin), kHugePage) - reinterpret_cast<uintptr_t>(begin);
    if (skip) munmap(begin, skip);
    base_ = begin + skip;
    if (skip < kHugePage) munmap(base_ + size_, kHugePage - skip);
#ifdef MADV_HUGEPAGE
    madvise(base_, size_, MADV_HUGEPAGE);
#endif
}

Arena::~Arena() { munmap(base_, size_); }

std::byte* Arena::take(size_t n_bytes) {
    std::byte* at = base_ + used_;
    used_ += round_up(n_bytes, 64);
    return at;
}

size_t arena_bytes(const Tensor& tensor) {
    const int64_t n_rows = tensor.shape[0], n_cols = tensor.shape[1];
    const size_t panel = panel_bytes(tensor.dtype, static_cast<int>(n_cols));
    const size_t n_bytes = panel ? (n_rows + kPanel - 1) / kPanel * panel : tensor.n_bytes;
    return round_up(n_bytes, 64);
}

void load_matrices(const GgufFile& file, const std::vector<LoadItem>& items, Arena& arena, ThreadPool& pool) {
    struct Piece {
        const Tensor* tensor;
        const Matrix* to;
        int first_row, n_rows;
    };
    std::vector<Piece> pieces;
    size_t largest = 0;
    for (const auto& [tensor, to] : items) {
        const int n_rows = static_cast<int>(tensor->shape[0]), n_cols = static_cast<int>(tensor->shape[1]);
        const size_t row = row_bytes(format_of(tensor->dtype), n_cols);
        const size_t panel = panel_bytes(tensor->dtype, n_cols);
        *to = {tensor->dtype, panel != 0, n_rows, n_cols, arena.take(arena_bytes(*tensor)), panel ? panel : row};
        const int step = static_cast<int>(std::max<size_t>(kPiece / (row * kPanel), 1)) * kPanel;
        for (int first = 0; first < n_rows; first += step) {
            pieces.push_back({tensor, to, first, std::min(step, n_rows - first)});
            largest = std::max(largest, row * std::min(step, n_rows));
        }
    }
    std::vector<std::vector<std::byte>> buffers(pool.size());
    pool.run([&](int thread) {
        std::vector<std::byte>& buffer = buffers[thread];
        pool.each(static_cast<int>(pieces.size()), [&](int i) {
            const auto& [tensor, to, first, n_rows] = pieces[i];
            const size_t row = row_bytes(format_of(tensor->dtype), to->n_cols);
            auto* data = const_cast<std::byte*>(to->data);
            if (!to->packed) {
                file.read(tensor->offset + first * row, data + first * row, n_rows * row);
                return;
            }
            buffer.resize(largest);
            file.read(tensor->offset + first * row, buffer.data(), n_rows * row);
            for (int r = 0; r < n_rows; r += kPanel)
                pack_panel(tensor->dtype, buffer.data() + r * row, row, std::min(kPanel, n_rows - r), to->n_cols,
                           data + (first + r) / kPanel * to->stride);
        });
    });
}

std::vector<float> load_vector(const GgufFile& file, const Tensor& tensor) {
    std::vector<std::byte> raw(tensor.n_bytes);
    file.read(tensor.offset, raw.data(), raw.size());
    std::vector<float> out(tensor.shape[0]);
    format_of(tensor.dtype).decode(raw.data(), out.data(), tensor.shape[0]);
    return out;
}

}  // namespace gemmart::cpu
