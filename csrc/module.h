// The parts of the Python border; each register_* adds its names to the module.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace gemmart {

// The bytes of a str, bytes or os.PathLike, as the system has them.
std::string path_bytes(const pybind11::object& path);

void register_gguf(pybind11::module_& m);
void register_kv(pybind11::module_& m);
void register_kernels(pybind11::module_& m);
void register_model(pybind11::module_& m);

}  // namespace gemmart
