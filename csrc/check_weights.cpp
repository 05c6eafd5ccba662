#include "check_weights.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <vector>

#include "cpu/threads.h"
#include "error.h"

namespace gemmart {
namespace {

constexpr int64_t kPiece = 64 << 10;  // weights, a multiple of every block

bool is_finite(float x) { return (std::bit_cast<uint32_t>(x) & 0x7f800000) != 0x7f800000; }

bool all_finite(const float* x, int64_t n) {
    uint32_t most = 0;  // of the bits of magnitudes, which are in the order of the magnitudes
    for (int64_t i = 0; i < n; i++) most = std::max(most, std::bit_cast<uint32_t>(x[i]) & 0x7fffffff);
    return most < 0x7f800000;
}

struct Piece {
    const Tensor* tensor;
    int64_t first, n;  // weights
};

int64_t size_of(const Tensor& tensor) {
    int64_t n = 1;
    for (int64_t size : tensor.shape) n *= size;
    return n;
}

}  // namespace

void check_weights(const GgufFile& file, int n_threads, Loading& loading) {
    std::vector<Piece> pieces;
    for (const Tensor& tensor : file.tensors()) {
        const int64_t n = size_of(tensor);
        for (int64_t first = 0; first < n; first += kPiece)
            pieces.push_back({&tensor, first, std::min(kPiece, n - first)});
        loading.total += tensor.n_bytes;
    }
    const int n_pieces = static_cast<int>(pieces.size());
    std::atomic<int> bad{n_pieces};  // the first piece that has one
    const auto decode = [&](const Piece& piece, std::vector<std::byte>& raw, std::vector<float>& to) {
        const FormatInfo& format = format_of(piece.tensor->dtype);
        raw.resize(row_bytes(format, piece.n));
        to.resize(piece.n);
        file.bytes().read(piece.tensor->offset + row_bytes(format, piece.first), raw.data(), raw.size());
        format.decode(raw.data(), to.data(), piece.n);
    };
    cpu::ThreadPool pool(n_threads);
    pool.run([&](int) {
        std::vector<std::byte> raw;
        std::vector<float> decoded;
        pool.each(n_pieces, [&](int i) {
            check<Cancelled>(!loading.cancelled, "the load was cancelled");
            if (i > bad) return;
            decode(pieces[i], raw, decoded);
            loading.done += raw.size();
            if (all_finite(decoded.data(), pieces[i].n)) return;
            for (int now = bad; i < now && !bad.compare_exchange_weak(now, i);) {
            }
        });
    });
    file.bytes().check_unchanged();
    if (bad == n_pieces) return;
    const Piece& piece = pieces[bad];
    std::vector<std::byte> raw;
    std::vector<float> decoded;
    decode(piece, raw, decoded);
    const int64_t at = piece.first + (std::find_if_not(decoded.begin(), decoded.end(), is_finite) - decoded.begin());
    const int64_t n_cols = piece.tensor->shape.back();
    throw NumericError(message(file.path(), ": tensor ", piece.tensor->name, ": row ", at / n_cols, ", column ",
                               at % n_cols, " is ", decoded[at - piece.first],
                               ": the file is damaged, or was made of weights that were; fetch it anew"));
}

}  // namespace gemmart
