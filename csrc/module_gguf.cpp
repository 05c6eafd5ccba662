// Files and formats at the border.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>

#include "error.h"
#include "gguf.h"
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

std::unique_ptr<GgufFile> open_file(const py::args& parts) {
    std::vector<Range> ranges = ranges_of(parts);
    py::gil_scoped_release nogil;
    return std::make_unique<GgufFile>(std::move(ranges));
}

py::list keys(const GgufFile& file) {
    py::list out;
    for (const MetaValue& v : file.metadata()) out.append(v.key);
    return out;
}

py::object get(const GgufFile& file, const std::string& key) {
    const MetaValue& v = file.value(key);
    if (v.type == ValueType::string) {
        check<std::invalid_argument>(!v.is_array, "key '", key, "' is an array of strings; use strings(key)");
        const std::string_view text = file.get_string(key);
        return py::bytes(text.data(), text.size()).attr("decode")("utf-8", "replace");
    }
    // NumPy's name of a type: its kind and its bytes.
    py::array values(py::dtype(message(name_of(v.type)[0], bytes_of(v.type))), v.count);
    std::memcpy(values.mutable_data(), v.data, v.n_bytes);
    return v.is_array ? py::object(values) : values.attr("item")();
}

py::tuple strings(const GgufFile& file, const std::string& key) {
    const StringArray all = file.get_strings(key);
    return py::make_tuple(py::array_t<uint8_t>(all.blob.size(), reinterpret_cast<const uint8_t*>(all.blob.data())),
                          py::array_t<int64_t>(all.offsets.size(), all.offsets.data()));
}

py::list tensors(const GgufFile& file) {
    py::list out;
    for (const Tensor& t : file.tensors()) {
        out.append(py::make_tuple(t.name, format_of(t.dtype).name, py::tuple(py::cast(t.shape)), t.offset, t.n_bytes));
    }
    return out;
}

}  // namespace

std::vector<Range> ranges_of(const py::args& parts) {
    const py::object fsencode = py::module_::import("os").attr("fsencode");
    std::vector<Range> ranges;
    for (const py::handle& part : parts) {
        py::object path = py::reinterpret_borrow<py::object>(part);
        uint64_t offset = 0, length = 0;
        if (py::isinstance<py::tuple>(part)) {
            try {
                std::tie(path, offset, length) = py::cast<std::tuple<py::object, uint64_t, uint64_t>>(part);
            } catch (const py::cast_error&) {
                throw std::invalid_argument("a part is a path or (path, offset, length), offset and length >= 0");
            }
        }
        ranges.push_back({py::bytes(fsencode(path)), offset, length});
    }
    check<std::invalid_argument>(!ranges.empty(), "no part is given");
    return ranges;
}

void register_gguf(py::module_& m) {
    py::class_<GgufFile>(m, "Gguf", "A GGUF file: metadata and tensor table, checked. All arrays returned are copies.")
        .def(py::init(&open_file),
             "Open the GGUF file that the parts hold, one after another, or the files of a split model, one a part.\n"
             "A part is a path, or (path, offset, length): `length` bytes (0: all to the end) from byte `offset`.\n"
             "Raises ModelNotFound, ModelFormatError, TruncatedModel, UnsupportedModel (a storage format not read "
             "here).")
        .def_property_readonly(
            "path",
            [](const GgufFile& file) { return py::module_::import("os").attr("fsdecode")(py::bytes(file.path())); })
        .def_property_readonly("version", &GgufFile::version)
        .def("__contains__", [](const GgufFile& file, const std::string& key) { return file.has(key); })
        .def("keys", keys, "The metadata keys, in the order of the file.")
        .def(
            "type_of", [](const GgufFile& file, const std::string& key) { return file.type_of(key); }, py::arg("key"),
            "The type of a value, for example 'u32' or 'str[]'.")
        .def("get", get, py::arg("key"),
             "A scalar as int, float, bool or str (bytes that are not UTF-8 become U+FFFD), an array of numbers as a\n"
             "NumPy array. Raises ModelFormatError if the key is missing, InvalidRequest if it is an array of strings.")
        .def(
            "get_bytes",
            [](const GgufFile& file, const std::string& key) {
                const std::string_view text = file.get_string(key);
                return py::bytes(text.data(), text.size());
            },
            py::arg("key"), "A string as the bytes that the file has. Raises ModelFormatError.")
        .def("strings", strings, py::arg("key"),
             "An array of strings as (uint8 [bytes], int64 [n + 1]): string i is blob[offsets[i]:offsets[i + 1]].")
        .def("tensors", tensors,
             "The tensors as (name, format, shape, offset, bytes); the last size is contiguous; the offset counts from "
             "the first byte of the first part.")
        .def(
            "read",
            [](const GgufFile& file, uint64_t offset, size_t n) {
                std::string bytes(n, '\0');
                file.bytes().read(offset, bytes.data(), n);
                return py::bytes(bytes);
            },
            py::arg("offset"), py::arg("n"),
            "`n` bytes from an offset such as tensors() tells. Raises ModelChanged where there are not so many.")
        .def(
            "check_unchanged", [](const GgufFile& file) { file.bytes().check_unchanged(); },
            "Raises ModelChanged if a file was modified after it was opened.");
    m.def("formats", list_formats, "The storage formats: (name, GGUF type id, weights a block, bytes a block) each.");
    m.def("decode", decode_bytes, py::arg("format_name"), py::arg("data"),
          "Decode whole blocks: `data` is contiguous bytes; returns float32 [n_blocks × weights a block].\n"
          "Raises InvalidRequest for an unknown format or a number of bytes that is not a multiple of the block.");
}

}  // namespace gemmart
