// The parts of the Python border; each register_* adds its names to the module.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "byte_source.h"

namespace gemmart {

// Parts of a model: each a path (str, bytes or os.PathLike), or (path, offset, length). Throws std::invalid_argument.
std::vector<Range> ranges_of(const pybind11::args& parts);

void register_gguf(pybind11::module_& m);
void register_kv(pybind11::module_& m);
void register_kernels(pybind11::module_& m);
void register_model(pybind11::module_& m);
void register_quantize(pybind11::module_& m);

}  // namespace gemmart
