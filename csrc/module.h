// The parts of the Python border; each register_* adds its names to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace gemmart {

void register_gguf(pybind11::module_& m);
void register_kv(pybind11::module_& m);
void register_kernels(pybind11::module_& m);
void register_model(pybind11::module_& m);

}  // namespace gemmart
