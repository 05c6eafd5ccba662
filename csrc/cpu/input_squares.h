// Sums of the squares of what each column of a matrix is multiplied with, over all rows of all passes: what tells how
// much an error in that column matters. Off, adding is one branch.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace gemmart::cpu {

class InputSquares {
  public:
    struct Sums {
        std::vector<std::string> names;  // of the matrices with this input
        std::vector<double> squares;     // [n_cols]
        int64_t n_rows = 0;
    };

    // The input of `first` is that of all matrices of these names.
    void track(const Matrix& first, std::vector<std::string> names) { sums_[&first].names = std::move(names); }

    // Forgets what was added, and adds from now on or no more.
    void set(bool on) {
        on_ = on;
        for (auto& [matrix, sums] : sums_) {
            sums.squares.assign(on ? matrix->n_cols : 0, 0);
            sums.n_rows = 0;
        }
    }
    bool on() const { return on_; }

    // Columns [first, first + n) of a row of the input of a matrix; any thread. A row counts with its first column.
    void add(const Matrix& matrix, const float* x, int first, int n) {
        if (!on_) return;
        const auto found = sums_.find(&matrix);
        if (found == sums_.end()) return;
        const std::lock_guard lock(mutex_);
        double* to = found->second.squares.data() + first;
        for (int i = 0; i < n; ++i) to[i] += static_cast<double>(x[i]) * x[i];
        found->second.n_rows += first == 0;
    }

    std::vector<Sums> all() const {
        std::vector<Sums> out;
        for (const auto& [matrix, sums] : sums_)
            if (on_) out.push_back(sums);
        return out;
    }

  private:
    bool on_ = false;
    std::map<const Matrix*, Sums> sums_;
    std::mutex mutex_;
};

}  // namespace gemmart::cpu
