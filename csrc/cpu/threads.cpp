#include "cpu/threads.h"

#include <utility>

namespace gemmart::cpu {
namespace {

// Waits until `value` is not `old`: spins first, since phases follow each other within microseconds, then sleeps, so
// that an idle or crowded machine loses nothing.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
    constexpr int kSpins = 20000;  // some 200 microseconds
    for (int i = 0; i < kSpins; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads) {
    for (int i = 1; i < n_threads; ++i) threads_.emplace_back([this, i] { loop(i); });
}

ThreadPool::~ThreadPool() {
    stop_ = true;
    run_.fetch_add(1, std::memory_order_release);
    run_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(const std::function<void(int)>& work) {
    work_ = &work;
    run_.fetch_add(1, std::memory_order_release);
    run_.notify_all();
    work(0);
    barrier();  // nobody is in `work` any more
    if (failed_.test()) {
        failed_.clear();
        std::rethrow_exception(std::exchange(error_, nullptr));
    }
}

void ThreadPool::loop(int index) {
    for (uint32_t seen = 0;; ++seen) {
        wait_for_change(run_, seen);
        if (stop_) return;
        (*work_)(index);
        barrier();
    }
}

void ThreadPool::barrier() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < n_threads_) {
        wait_for_change(phase_, phase);
        return;
    }
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    if (n_threads_ > 1) phase_.notify_all();
}

void ThreadPool::fail(std::exception_ptr error) {
    if (!failed_.test_and_set()) error_ = std::move(error);
}

}  // namespace gemmart::cpu
