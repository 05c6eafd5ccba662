// Where the time of a forward pass goes: seconds by phase, as thread 0 sees them. Off, a stamp is one branch.
#pragma once

#include <chrono>
#include <cstring>
#include <vector>

namespace gemmart::cpu {

struct PhaseTime {
    const char* name;
    double seconds;
};

class PhaseTimer {
  public:
    // Forgets what was measured, and measures from now on or no more.
    void set(bool on) { on_ = on, times_.clear(); }
    const std::vector<PhaseTime>& times() const { return times_; }  // in order of their first end

    // A pass begins.
    void begin() {
        if (on_) last_ = Clock::now();
    }
    // The phase `name`, a literal, has ended: what has passed since the last stamp was its time.
    void end(int thread, const char* name) {
        if (!on_ || thread != 0) return;
        const Clock::time_point now = Clock::now();
        const double seconds = std::chrono::duration<double>(now - last_).count();
        last_ = now;
        for (PhaseTime& t : times_)
            if (std::strcmp(t.name, name) == 0) {
                t.seconds += seconds;
                return;
            }
        times_.push_back({name, seconds});
    }

  private:
    using Clock = std::chrono::steady_clock;
    bool on_ = false;
    Clock::time_point last_;
    std::vector<PhaseTime> times_;
};

}  // namespace gemmart::cpu
