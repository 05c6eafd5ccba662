// How fast the memory of this machine can be read: the limit of every pass that reads each weight once.
#pragma once

#include <cstddef>

namespace gemmart::cpu {

// Bytes a second at which `n_threads` threads read `n_bytes`, each its own part, from the kind of memory that holds
// weights: the best of several passes. Throws std::invalid_argument, OutOfMemory.
double read_bandwidth(size_t n_bytes, int n_threads);

}  // namespace gemmart::cpu
