// How the panels of a product are shared out among threads.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "cpu/layout.h"

namespace gemmart::cpu {

inline constexpr int kManyRowsPanels = 8;  // of an item, where there are many rows

// Item i is a run of panels. With few rows the work is reading: each thread has one long run, since the hardware reads
// ahead in a run only, and what is left is shared out in short ones, so that all end together. With many rows all items
// are alike.
class PanelItems {
  public:
    // unit: least panels of an item; most: panels that one may have
    PanelItems(int n_panels, int n_threads, int n_rows, int unit, int most = std::numeric_limits<int>::max())
        : n_panels_(n_panels) {
        constexpr int kShortItems = 4;  // a thread
        if (n_rows > kMaxWidth) {
            short_ = std::max(kManyRowsPanels, unit);
            return;
        }
        n_long_ = n_threads;
        long_ = std::min(n_panels / n_threads * 7 / 8, most) / unit * unit;
        const int left = n_panels - n_long_ * long_;
        short_ = std::min(left / (n_threads * kShortItems) + unit, most) / unit * unit;
    }
    int size() const { return n_long_ + (n_panels_ - n_long_ * long_ + short_ - 1) / short_; }
    std::pair<int, int> operator[](int i) const {
        if (i < n_long_) return {i * long_, (i + 1) * long_};
        const int begin = n_long_ * long_ + (i - n_long_) * short_;
        return {begin, std::min(n_panels_, begin + short_)};
    }

  private:
    int n_panels_, n_long_ = 0, long_ = 0, short_;
};

}  // namespace gemmart::cpu
