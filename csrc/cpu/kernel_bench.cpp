#include "cpu/kernel_bench.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cpu/activations.h"
#include "error.h"

namespace gemmart::cpu {
namespace {

constexpr int kColumns = 2304;  // of weights
constexpr int kPasses = 3;
constexpr double kSeconds = 0.05;                  // of a pass
constexpr size_t kMostProducts = size_t{1} << 33;  // of a pass

// Numbers of every kind: bytes 32 to 63, which are neither NaN nor tiny as floats of any size.
void fill(std::byte* bytes, size_t n) {
    uint32_t state = 1;
    for (size_t i = 0; i < n; ++i) {
        state = state * 1664525 + 1013904223;
        bytes[i] = static_cast<std::byte>(32 + (state >> 27));
    }
}

double seconds_of(const std::function<void()>& work) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

KernelBench::KernelBench(const Kernels& kernels, int n_threads, size_t n_bytes)
    : kernels_(kernels),
      pool_((check<std::invalid_argument>(n_threads >= 1 && n_threads <= 1024, "n_threads is ", n_threads,
                                          ", expected 1 to 1024"),
             n_threads)),
      n_bytes_((check<std::invalid_argument>(n_bytes >= 1 << 20 && n_bytes <= size_t{1} << 36, "n_bytes is ", n_bytes,
                                             ", expected 2^20 to 2^36"),
                n_bytes)),
      arena_(n_bytes + n_threads * kScratchBytes),
      bytes_(arena_.take(n_bytes)) {
    for (int i = 0; i < n_threads; ++i) scratch_.push_back(arena_.take(kScratchBytes));
    constexpr size_t kPart = 1 << 20;
    fill(bytes_, kPart);
    const int n_parts = static_cast<int>(n_bytes / kPart);
    pool_.run([&](int) {
        pool_.each(n_parts, [&](int i) {
            if (i) std::memcpy(bytes_ + i * kPart, bytes_, kPart);
        });
    });
    fill(bytes_ + n_parts * kPart, n_bytes - n_parts * kPart);
}

double KernelBench::best_of_passes(const std::function<void(int)>& work) {
    double best = 1e30;
    for (int pass = 0; pass < kPasses; ++pass) best = std::min(best, seconds_of([&] { pool_.run(work); }));
    return best;
}

KernelTime KernelBench::matmul(DType dtype, int n_tokens) {
    check<std::invalid_argument>(n_tokens >= 1 && n_tokens <= 4096, "n_tokens is ", n_tokens, ", expected 1 to 4096");
    const size_t n = static_cast<size_t>(n_tokens) * kColumns;
    std::vector<float> row(kColumns);
    for (int i = 0; i < kColumns; ++i) row[i] = static_cast<float>(i % 37 - 18) / 7;
    const OwnedActivations activations(kernels_, n_tokens, kColumns, false, [&](int) { return row.data(); });

    const size_t panel = panel_bytes(dtype, kColumns), row_size = row_bytes(format_of(dtype), kColumns);
    const size_t panel_size = panel ? panel : kPanel * row_size;
    const int most = static_cast<int>(std::min(n_bytes_ / panel_size, kMostProducts / (n * kPanel)));
    std::vector<float> out(static_cast<size_t>(most) * kPanel * n_tokens);
    const auto pass_over = [&](int n_panels) {
        const Matrix w{dtype, panel != 0, n_panels * kPanel, kColumns, bytes_, panel ? panel : row_size};
        const int grain = n_tokens > kMaxWidth ? 8 : 1, n_items = (n_panels + grain - 1) / grain;
        return [=, this, &activations, &out](int thread) {
            pool_.each(n_items, [&](int i) {
                kernels_.matmul(w, activations.view, i * grain, std::min(n_panels, (i + 1) * grain), out.data(),
                                w.n_rows, scratch_[thread]);
            });
        };
    };
    // A few panels tell how many make a pass.
    const int few = std::min(most, 8 * pool_.size());
    const double seconds = best_of_passes(pass_over(few));
    const int n_panels = std::clamp(static_cast<int>(few * kSeconds / seconds), few, most);
    return {best_of_passes(pass_over(n_panels)), static_cast<double>(n_panels * panel_size),
            static_cast<double>(n_panels) * kPanel * n};
}

KernelTime KernelBench::attention(KvType type, int n_tokens) {
    constexpr int kHeadDim = 256, kRowsAToken = 2, kMostTokens = 32;
    check<std::invalid_argument>(n_tokens >= 1 && n_tokens <= kMostTokens, "n_tokens is ", n_tokens, ", expected 1 to ",
                                 kMostTokens);
    const KvHeadLayout layout = kv_head_layout(type, kHeadDim);
    const size_t n_pages = std::min<size_t>(8192 / kPageTokens, n_bytes_ / layout.n_bytes);
    const int n_positions = static_cast<int>(n_pages) * kPageTokens, n_rows = n_tokens * kRowsAToken;
    const int n_heads = static_cast<int>(std::max<size_t>(n_bytes_ / layout.n_bytes / n_pages, 1));
    const std::vector<float> query(kHeadDim, 0.01f);
    std::vector<const float*> queries(n_rows, query.data());
    std::vector<int> positions(n_rows);
    for (int i = 0; i < n_rows; ++i) positions[i] = n_positions - n_tokens + i / kRowsAToken;
    const size_t size = partial_size(kHeadDim);
    std::vector<float> results(pool_.size() * n_rows * size);
    const auto pass_over = [&](int heads) {
        return [&, heads](int thread) {
            float* partials = results.data() + thread * n_rows * size;
            std::vector<const std::byte*> pages(n_pages);
            pool_.each(heads, [&](int head) {
                for (size_t page = 0; page < n_pages; ++page)
                    pages[page] = bytes_ + (head * n_pages + page) * layout.n_bytes;
                kernels_.attention({type, layout, kHeadDim, n_rows, queries.data(), positions.data(), 0, 50,
                                    pages.data(), 0, (n_positions + kRange - 1) / kRange, partials, size},
                                   scratch_[thread]);
            });
        };
    };
    const int few = std::min(n_heads, pool_.size());
    const double seconds = best_of_passes(pass_over(few));
    const int heads = std::clamp(static_cast<int>(few * kSeconds / seconds), few, n_heads);
    double n_products = 0;
    for (int position : positions) n_products += 2.0 * heads * kHeadDim * (position + 1);
    return {best_of_passes(pass_over(heads)), static_cast<double>(heads) * n_pages * layout.n_bytes, n_products};
}

std::vector<std::pair<std::string, double>> KernelBench::vectors() {
    constexpr int kNumbers = 4096, kRounds = 512, kHeadDim = 256;
    std::vector<float> x(kNumbers), y(kNumbers, 0.5f), out(kNumbers);
    for (int i = 0; i < kNumbers; ++i) x[i] = static_cast<float>(i % 41 - 20) / 8;
    const float* column = x.data();
    const Kernels& k = kernels_;
    const OwnedActivations packed(k, 1, kNumbers, false, [&](int) { return column; });
    volatile double seen = 0;  // of the kernels that only return
    const std::pair<const char*, std::function<void()>> all[] = {
        {"quantize", [&] { k.quantize(&column, 1, 1, kNumbers, packed.view.data); }},
        {"rms_norm", [&] { k.rms_norm(x.data(), y.data(), kNumbers, 1e-6f, out.data()); }},
        {"add", [&] { k.add(out.data(), y.data(), kNumbers); }},
        {"scale", [&] { k.scale(out.data(), 1, kNumbers); }},
        {"gelu gate", [&] { k.gate(Activation::Gelu, x.data(), y.data(), kNumbers, out.data()); }},
        {"silu gate", [&] { k.gate(Activation::Silu, x.data(), y.data(), kNumbers, out.data()); }},
        {"softcap", [&] { k.softcap(out.data(), kNumbers, 30); }},
        {"rope",
         [&] {
             for (int i = 0; i < kNumbers; i += kHeadDim) k.rope(out.data() + i, y.data(), y.data(), kHeadDim, true);
         }},
        {"all_finite", [&] { seen = seen + k.all_finite(x.data(), kNumbers); }},
        {"find_above", [&] { seen = seen + k.find_above(x.data(), 0, kNumbers, 9); }},
        {"sum_exp", [&] { seen = seen + k.sum_exp(x.data(), kNumbers, 9); }},
    };
    std::vector<std::pair<std::string, double>> found;
    for (const auto& [name, kernel] : all) {
        double best = 1e30;
        for (int pass = 0; pass < kPasses; ++pass)
            best = std::min(best, seconds_of([&, &run = kernel] {
                                for (int i = 0; i < kRounds; ++i) run();
                            }));
        found.emplace_back(name, static_cast<double>(kRounds) * kNumbers / best);
    }
    return found;
}

}  // namespace gemmart::cpu
