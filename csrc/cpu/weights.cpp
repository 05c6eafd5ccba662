#include "cpu/weights.h"

#include <sys/mman.h>

#include <algorithm>

#include "error.h"

namespace gemmart::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kLocked = 64 << 20;  // bytes locked in memory at a time
constexpr size_t kPiece = 512 << 10;  // bytes of the file that a thread reads and packs at a time

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

size_t packed_bytes(const Tensor& tensor) {
    const int64_t n_rows = tensor.shape[0], n_cols = tensor.shape[1];
    const size_t panel = panel_bytes(tensor.dtype, static_cast<int>(n_cols));
    const size_t n_bytes = panel ? (n_rows + kPanel - 1) / kPanel * panel : tensor.n_bytes;
    return round_up(n_bytes, 64);
}

size_t file_bytes(const std::vector<LoadItem>& items) {
    size_t total = 0;
    for (const LoadItem& item : items) total += item.tensor->n_bytes;
    return total;
}

std::vector<const Tensor*> tensors_of(const std::vector<LoadItem>& items) {
    std::vector<const Tensor*> tensors;
    for (const LoadItem& item : items) tensors.push_back(item.tensor);
    return tensors;
}

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

void Arena::lock(const Loading& loading) {
    for (size_t at = 0; at < size_; at += kLocked) {
        check<Cancelled>(!loading.cancelled, "the load was cancelled");
        lock_memory(base_ + at, std::min(kLocked, size_ - at));
    }
}

std::byte* Arena::take(size_t n_bytes) {
    std::byte* at = base_ + used_;
    used_ += round_up(n_bytes, 64);
    return at;
}

size_t packed_bytes(const std::vector<const Tensor*>& tensors) {
    size_t total = 0;
    for (const Tensor* tensor : tensors) total += packed_bytes(*tensor);
    return total;
}

// For one panel of the widest matrix, and for so many smaller ones as stay in a thread's cache while all columns pass.
size_t room_bytes(const std::vector<const Tensor*>& tensors) {
    size_t largest = 512 << 10;
    for (const Tensor* t : tensors) largest = std::max(largest, panel_bytes(t->dtype, static_cast<int>(t->shape[1])));
    return round_up(largest, 64);
}

size_t copied_bytes(const ByteSource& source, const std::vector<const Tensor*>& tensors) {
    size_t total = 0;
    for (const Tensor* t : tensors)
        if (!source.in_one_range(t->offset, t->n_bytes)) total += round_up(t->n_bytes, 64);
    return total;
}

Weights::Weights(const GgufFile& file, const std::vector<LoadItem>& items, const WeightOptions& options,
                 Loading& loading, ThreadPool& pool)
    : file_(file),
      room_bytes_(room_bytes(tensors_of(items))),
      arena_(options.mapped ? pool.size() * room_bytes_ + copied_bytes(file.bytes(), tensors_of(items))
                            : packed_bytes(tensors_of(items))) {
    if (options.locked) arena_.lock(loading);
    if (options.mapped) {
        map(items, options, loading);
        for (int i = 0; i < pool.size(); ++i) rooms_.push_back(arena_.take(room_bytes_));
    } else {
        load(items, file_bytes(items) > options.cache_bytes, loading, pool);
    }
    file.bytes().check_unchanged();
}

void Weights::map(const std::vector<LoadItem>& items, const WeightOptions& options, Loading& loading) {
    const ByteSource& source = file_.bytes();
    mapped_ = std::make_unique<MappedSource>(source);
    const double share = options.locked ? 1 : static_cast<double>(options.cache_bytes) / file_bytes(items);
    if (options.locked) loading.total += file_bytes(items);
    double n_seen = 0, n_kept = 0;
    for (const auto& [tensor, to] : items) {
        const int n_rows = static_cast<int>(tensor->shape[0]), n_cols = static_cast<int>(tensor->shape[1]);
        *to = {tensor->dtype, false, n_rows, n_cols, nullptr, row_bytes(format_of(tensor->dtype), n_cols)};
        if (!source.in_one_range(tensor->offset, tensor->n_bytes)) {
            std::byte* copy = arena_.take(tensor->n_bytes);
            source.read(tensor->offset, copy, tensor->n_bytes);
            to->data = copy;
            continue;
        }
        to->data = mapped_->at(tensor->offset);
        for (size_t at = 0; options.locked && at < tensor->n_bytes; at += kLocked) {
            check<Cancelled>(!loading.cancelled, "the load was cancelled");
            const size_t n = std::min(kLocked, tensor->n_bytes - at);
            mapped_->lock(tensor->offset + at, n);
            loading.done += n;
        }
        // Those that are read anew stand evenly between the others, so that the device reads while these are
        // multiplied.
        n_seen += tensor->n_bytes;
        if (n_kept + tensor->n_bytes <= n_seen * share)
            n_kept += tensor->n_bytes;
        else
            streams_.emplace_back(tensor, to->data);
    }
}

// The thread that uses the last panels of a stream forgets it and sends for another; one more is on its way already.
void Weights::note_use(const Matrix& w, int n_panels) const {
    const auto stream =
        std::find_if(streams_.begin(), streams_.end(), [&](const Stream& s) { return s.data == w.data; });
    if (stream == streams_.end() || (stream->n_used += n_panels) < (w.n_rows + kPanel - 1) / kPanel) return;
    stream->n_used = 0;
    mapped_->forget(stream->tensor->offset, stream->tensor->n_bytes);
    file_.bytes().drop_cached(stream->tensor->offset, stream->tensor->n_bytes);
    const Stream& next = streams_[(stream - streams_.begin() + 2) % streams_.size()];
    mapped_->prefetch(next.tensor->offset, next.tensor->n_bytes);
}

void Weights::load(const std::vector<LoadItem>& items, bool drop_cached, Loading& loading, ThreadPool& pool) {
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
        *to = {tensor->dtype, panel != 0, n_rows, n_cols, arena_.take(packed_bytes(*tensor)), panel ? panel : row};
        const int step = static_cast<int>(std::max<size_t>(kPiece / (row * kPanel), 1)) * kPanel;
        for (int first = 0; first < n_rows; first += step) {
            pieces.push_back({tensor, to, first, std::min(step, n_rows - first)});
            largest = std::max(largest, row * std::min(step, n_rows));
        }
    }
    loading.total += file_bytes(items);
    std::vector<std::vector<std::byte>> buffers(pool.size());
    pool.run([&](int thread) {
        std::vector<std::byte>& buffer = buffers[thread];
        pool.each(static_cast<int>(pieces.size()), [&](int i) {
            check<Cancelled>(!loading.cancelled, "the load was cancelled");
            const auto& [tensor, to, first, n_rows] = pieces[i];
            const size_t row = row_bytes(format_of(tensor->dtype), to->n_cols), offset = tensor->offset + first * row;
            auto* data = const_cast<std::byte*>(to->data);
            if (to->packed) {
                buffer.resize(largest);
                file_.bytes().read(offset, buffer.data(), n_rows * row);
                const Matrix rows{to->dtype, false, n_rows, to->n_cols, buffer.data(), row};
                pack(rows, 0, (n_rows + kPanel - 1) / kPanel, data + first / kPanel * to->stride);
            } else {
                file_.bytes().read(offset, data + first * row, n_rows * row);
            }
            if (drop_cached) file_.bytes().drop_cached(offset, n_rows * row);
            loading.done += n_rows * row;
        });
    });
}

void Weights::pack(const Matrix& w, int panel, int n_panels, std::byte* to) {
    const size_t stride = panel_bytes(w.dtype, w.n_cols);
    for (int row = panel * kPanel; n_panels-- > 0; row += kPanel, to += stride)
        pack_panel(w.dtype, w.data + row * w.stride, w.stride, std::min(kPanel, w.n_rows - row), w.n_cols, to);
}

void Weights::check_unchanged() const {
    if (!mapped_) return;
    file_.bytes().check_unchanged();
    check<FileChanged>(!mapped_->lost(), file_.path(), ": could not be read any more while it was in use");
}

}  // namespace gemmart::cpu
