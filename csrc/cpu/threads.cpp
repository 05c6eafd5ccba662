#include "cpu/threads.h"

#include <system_error>
#include <utility>

#include "error.h"

namespace gemmart::cpu {

thread_local int ThreadPool::at_ = 0;

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads), phases_(kMaxPhases) {
    try {
        for (int i = 1; i < n_threads; ++i) threads_.emplace_back([this, i] { loop(i); });
    } catch (const std::system_error& error) {
        end();
        throw OutOfMemory(message("thread ", threads_.size() + 1, " of ", n_threads,
                                  " cannot be started: ", error.what(), "; choose fewer"));
    }
}

ThreadPool::~ThreadPool() { end(); }

void ThreadPool::end() {
    stop_ = true;
    run_.fetch_add(1, std::memory_order_release);
    run_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(const std::function<void(int)>& work) {
    work_ = &work;
    const int n_left = left_.load(std::memory_order_relaxed) + n_threads_ - 1;
    run_.fetch_add(1, std::memory_order_release);
    run_.notify_all();
    at_ = 0;
    work(0);
    wait_until(left_, n_left);  // nobody is in `work` any more
    for (int i = 0; i < at_; ++i) {
        phases_[i].next.store(0, std::memory_order_relaxed);
        phases_[i].done.store(0, std::memory_order_relaxed);
    }
    if (failed_.test()) {
        failed_.clear();
        std::rethrow_exception(std::exchange(error_, nullptr));
    }
}

void ThreadPool::loop(int index) {
    for (int n_runs = 1;; ++n_runs) {
        wait_until(run_, n_runs);
        if (stop_) return;
        at_ = 0;
        (*work_)(index);
        left_.fetch_add(1, std::memory_order_acq_rel);
        left_.notify_all();
    }
}

void ThreadPool::wait_until(const std::atomic<int>& value, int at_least) {
    constexpr int kSpins = 4000;  // some tens of microseconds: phases follow each other quickly
    for (int i = 0; i < kSpins; ++i) {
        if (value.load(std::memory_order_acquire) - at_least >= 0) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    for (int seen; (seen = value.load(std::memory_order_acquire)) - at_least < 0;)
        value.wait(seen, std::memory_order_acquire);
}

void ThreadPool::fail(std::exception_ptr error) {
    if (!failed_.test_and_set()) error_ = std::move(error);
}

}  // namespace gemmart::cpu
