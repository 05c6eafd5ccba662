// One pool of threads for all phases of a forward pass. Threads spin for the end of a phase for a moment, then sleep.
//
// A phase ends when its items are done, not when all threads have arrived: on a crowded machine a thread that is not
// given a processor holds nobody up unless it is in the middle of an item, and finds its place again when it comes
// back.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

namespace gemmart::cpu {

class ThreadPool {
  public:
    static constexpr int kMaxPhases = 1 << 15;  // of a run

    explicit ThreadPool(int n_threads);  // the caller of run() is one of them; throws OutOfMemory
    ~ThreadPool();
    int size() const { return n_threads_; }

    // Runs `work(index)` on every thread, index in [0, size()), and returns when all are done. One run() at a time.
    // Rethrows the first exception that an item of each() threw.
    void run(const std::function<void(int)>& work);

    // A phase. Called inside run() by all threads, in the same order and with the same n: hands out items [0, n) to
    // whoever is free and waits until all are done.
    template <typename F>
    void each(int n, F&& item) {
        each(n, std::forward<F>(item), [] {});
    }

    // The same, and whoever ends the last item goes on with then(), for which all wait too.
    template <typename F, typename Then>
    void each(int n, F&& item, Then&& then) {
        if (n == 0) return;
        Phase& phase = phases_[at_++];
        const auto guarded = [this](auto&& work) {
            try {
                work();
            } catch (...) {
                fail(std::current_exception());
            }
        };
        for (int i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < n;) {
            guarded([&] { item(i); });
            if (phase.done.fetch_add(1, std::memory_order_acq_rel) + 1 < n) continue;
            guarded(then);
            phase.done.fetch_add(1, std::memory_order_acq_rel);
            if (n_threads_ > 1) phase.done.notify_all();
        }
        wait_until(phase.done, n + 1);
    }

  private:
    struct Phase {
        std::atomic<int> next{0};
        std::atomic<int> done{0};
    };

    static void wait_until(const std::atomic<int>& value, int at_least);
    void fail(std::exception_ptr error);
    void loop(int index);
    void stop();

    static thread_local int at_;  // this thread's next phase of the run

    const int n_threads_;
    std::vector<std::thread> threads_;
    std::vector<Phase> phases_;
    const std::function<void(int)>* work_ = nullptr;
    bool stop_ = false;
    std::atomic<int> run_{0};   // one more at each run()
    std::atomic<int> left_{0};  // threads of the pool that have left `work_`, over all runs
    std::atomic_flag failed_{};
    std::exception_ptr error_;
};

}  // namespace gemmart::cpu
