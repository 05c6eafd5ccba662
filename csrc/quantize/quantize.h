// Floats become blocks of a storage format. A format that has an encode() in this folder can be written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "tensor.h"

namespace gemmart {

bool can_quantize(DType dtype);

// dst [n_rows, row_bytes] <- rows of n_cols floats; row(i, buffer): row i of them, in `buffer` [n_cols] or elsewhere.
// importance [n_cols]: what the square of an error in each column counts, nullptr for all alike. The same bits with any
// number of threads.
// Throws std::invalid_argument for a format that cannot be written, or n_cols that is no multiple of its block;
// FormatError for a weight that is not finite or too large for the format; it names `name` and, counted from
// `first_row`, its row.
void quantize_rows(DType dtype, const std::string& name, int64_t first_row, int64_t n_rows, int64_t n_cols,
                   const std::function<const float*(int64_t, float*)>& row, const float* importance, std::byte* dst,
                   int n_threads);

}  // namespace gemmart
