// Files and formats at the border.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "error.h"
#include "module.h"
#include "tensor.h"

namespace py = pybind11;

namespace gemmart {
namespace {

py::list list_formats() {
    py::list rows;
    for (const FormatInfo& f : formats()) {
        rows.append(py::make_tuple(f.name, static_cast<uint32_t>(f.dtype), f.block_size, f.block_bytes));
    }
    return rows;
}

py::array_t<float> decode_bytes(const std::string& name, const py::buffer& data) {
    const FormatInfo* format = nullptr;
    for (const FormatInfo& f : formats()) {
        if (f.name == name) format = &f;
    }
    check<std::invalid_argument>(format, "format_name is '", name, "', which is not one of formats()");
    const py::buffer_info bytes = data.request();
    const bool contiguous = PyBuffer_IsContiguous(bytes.view(), 'C');
    check<std::invalid_argument>(bytes.itemsize == 1 && contiguous, "data must be contiguous bytes");
    check<std::invalid_argument>(bytes.size % format->block_bytes == 0, "data has ", bytes.size, " bytes; a block of ",
                                 name, " has ", format->block_bytes);
    const int64_t n = bytes.size / format->block_bytes * format->block_size;
    py::array_t<float> out(n);
    float* dst = out.mutable_data();
    {
        py::gil_scoped_release nogil;
        format->decode(bytes.ptr, dst, n);
    }
    return out;
}

}  // namespace

void register_gguf(py::module_& m) {
    m.def("formats", list_formats, "The storage formats: (name, GGUF type id, weights a block, bytes a block) each.");
    m.def("decode", decode_bytes, py::arg("format_name"), py::arg("data"),
          "Decode whole blocks: `data` is contiguous bytes; returns float32 [n_blocks × weights a block].\n"
          "Raises InvalidRequest for an unknown format or a number of bytes that is not a multiple of the block.");
}

}  // namespace gemmart
