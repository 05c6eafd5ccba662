// Looks for weights that are no numbers.
#pragma once

#include "cpu/weights.h"
#include "gguf.h"

namespace gemmart {

// Decodes every tensor of a file. Throws NumericError that names the first weight that is NaN or infinite; Cancelled,
// FileChanged.
void check_weights(const GgufFile& file, int n_threads, cpu::Loading& loading);

}  // namespace gemmart
