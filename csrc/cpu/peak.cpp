#include "cpu/peak.h"

#include <algorithm>
#include <chrono>

#include "cpu/threads.h"
#include "error.h"

namespace gemmart::cpu {

double multiply_peak(const Kernels& kernels, bool integers, int n_threads) {
    check<std::invalid_argument>(n_threads >= 1 && n_threads <= 1024, "n_threads is ", n_threads,
                                 ", expected 1 to 1024");
    constexpr int kRounds = 1 << 18, kPasses = 50;  // a pass takes about a millisecond
    const auto multiply = integers ? kernels.multiply_int8 : kernels.multiply_float;
    ThreadPool pool(n_threads);
    std::vector<int64_t> products(n_threads);
    const std::function<void(int)> work = [&](int i) { products[i] = multiply(kRounds); };
    double best = 0;
    for (int pass = 0; pass < kPasses; ++pass) {
        const auto begin = std::chrono::steady_clock::now();
        pool.run(work);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        best = std::max(best, n_threads * products[0] / seconds.count());
    }
    return best;
}

}  // namespace gemmart::cpu
