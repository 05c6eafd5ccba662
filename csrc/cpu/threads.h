// One pool of threads for all phases of a forward pass. Threads spin for the next phase for a moment, then sleep.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

namespace gemmart::cpu {

class ThreadPool {
  public:
    explicit ThreadPool(int n_threads);  // the caller of run() is one of them
    ~ThreadPool();
    int size() const { return n_threads_; }

    // Runs `work(index)` on every thread, index in [0, size()), and returns when all are done. One run() at a time.
    // Rethrows the first exception that an item of each() threw.
    void run(const std::function<void(int)>& work);

    // Called by all threads inside run() with the same n: hands out items [0, n) to whoever is free and waits until all
    // are done.
    template <typename F>
    void each(int n, F&& item) {
        for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n;) {
            try {
                item(i);
            } catch (...) {
                fail(std::current_exception());
            }
        }
        barrier();
    }

  private:
    void barrier();
    void fail(std::exception_ptr error);
    void loop(int index);

    const int n_threads_;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* work_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<int> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};  // one more after each barrier
    std::atomic<uint32_t> run_{0};                // one more at each run()
    std::atomic_flag failed_{};
    std::exception_ptr error_;
};

}  // namespace gemmart::cpu
