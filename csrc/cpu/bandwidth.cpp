#include "cpu/bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/threads.h"
#include "cpu/weights.h"
#include "error.h"

namespace gemmart::cpu {
namespace {

constexpr size_t kBytesInAll = size_t{4} << 30;  // of all passes: some tenths of a second

typedef uint64_t Line __attribute__((vector_size(64)));

// Xors all lines into one number, so that the reads cannot be left out; four chains, so that they do not wait for each
// other.
uint64_t read_all(const Line* lines, size_t n) {
    Line a{}, b{}, c{}, d{};
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        a ^= lines[i], b ^= lines[i + 1], c ^= lines[i + 2], d ^= lines[i + 3];
    }
    for (; i < n; ++i) a ^= lines[i];
    a ^= b ^ c ^ d;
    uint64_t out = 0;
    for (int k = 0; k < 8; ++k) out ^= a[k];
    return out;
}

}  // namespace

double read_bandwidth(size_t n_bytes, int n_threads) {
    check<std::invalid_argument>(n_threads >= 1 && n_threads <= 1024, "n_threads is ", n_threads,
                                 ", expected 1 to 1024");
    const size_t n_lines = n_bytes / sizeof(Line) / n_threads;  // of a thread
    check<std::invalid_argument>(n_lines >= 1 && n_bytes <= size_t{1} << 32, "n_bytes is ", n_bytes,
                                 ", expected a line of 64 for each thread, and at most 2^32");
    const size_t n_read = n_lines * sizeof(Line) * n_threads;
    Arena arena(n_read);
    const auto* lines = reinterpret_cast<const Line*>(arena.take(n_read));
    std::vector<uint64_t> results(n_threads);
    ThreadPool pool(n_threads);
    // Pages that were never written are all the same page of zeros.
    pool.run([&](int i) { std::memset(const_cast<Line*>(lines + i * n_lines), i + 1, n_lines * sizeof(Line)); });
    const std::function<void(int)> read = [&](int i) { results[i] ^= read_all(lines + i * n_lines, n_lines); };
    pool.run(read);
    const size_t n_passes = std::clamp<size_t>(kBytesInAll / n_read, 4, 4096);
    double best = 0;
    for (size_t pass = 0; pass < n_passes; ++pass) {
        const auto begin = std::chrono::steady_clock::now();
        pool.run(read);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        best = std::max(best, n_read / seconds.count());
    }
    return best;
}

}  // namespace gemmart::cpu
