// Looks for weights that are no numbers.
#pragma once

#include "gguf.h"
#include "loading.h"

namespace gemmart {

// Decodes every tensor of a file. Throws NumericError that names the first weight that is NaN or infinite; Cancelled,
// FileChanged.
void check_weights(const GgufFile& file, int n_threads, Loading& loading);

}  // namespace gemmart
