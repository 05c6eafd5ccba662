// How fast this processor can multiply: the limit of every product whose numbers stand in registers.
#pragma once

#include "cpu/kernels.h"

namespace gemmart::cpu {

// Multiplications a second of `n_threads` threads with the ISA's own instructions: of 8-bit integers or of floats. The
// best of several passes. Throws std::invalid_argument, OutOfMemory.
double multiply_peak(const Kernels& kernels, bool integers, int n_threads);

}  // namespace gemmart::cpu
