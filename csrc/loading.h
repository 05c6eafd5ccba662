#pragma once

#include <atomic>
#include <cstddef>

namespace gemmart {

// What other threads may see and want of a load.
struct Loading {
    std::atomic<size_t> done{0}, total{0};  // bytes of the file
    std::atomic<bool> cancelled{false};     // the load throws Cancelled
};

}  // namespace gemmart
