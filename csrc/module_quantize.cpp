// Writing storage formats at the border.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "error.h"
#include "gguf.h"
#include "module.h"
#include "quantize/quantize.h"

namespace py = pybind11;
using namespace py::literals;

namespace gemmart {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<uint8_t>;

const FormatInfo& format_named(const std::string& name) {
    for (const FormatInfo& f : formats())
        if (f.name == name) return f;
    throw std::invalid_argument(message("format_name is '", name, "', which is not one of formats()"));
}

py::list list_quantizable() {
    py::list names;
    for (const FormatInfo& f : formats())
        if (can_quantize(f.dtype)) names.append(f.name);
    return names;
}

const float* check_importance(const std::optional<Floats>& importance, int64_t n_cols) {
    if (!importance) return nullptr;
    check<std::invalid_argument>(importance->ndim() == 1 && importance->size() == n_cols, "importance has ",
                                 importance->size(), " elements; rows have ", n_cols);
    return importance->data();
}

void check_threads(int n_threads) {
    check<std::invalid_argument>(n_threads >= 1 && n_threads <= 1024, "n_threads is ", n_threads,
                                 ", expected 1 to 1024");
}

Bytes quantize(const std::string& format_name, const Floats& x, const std::optional<Floats>& importance,
               int n_threads) {
    const FormatInfo& format = format_named(format_name);
    check<std::invalid_argument>(x.ndim() == 2, "x has ", x.ndim(), " dimensions, expected 2");
    check_threads(n_threads);
    const int64_t n_rows = x.shape(0), n_cols = x.shape(1);
    Bytes out({n_rows, static_cast<int64_t>(row_bytes(format, n_cols))});
    const float* w = check_importance(importance, n_cols);
    const float* rows = x.data();
    auto* dst = reinterpret_cast<std::byte*>(out.mutable_data());
    py::gil_scoped_release release;
    quantize_rows(
        format.dtype, "x", 0, n_rows, n_cols, [=](int64_t i, float*) { return rows + i * n_cols; }, w, dst, n_threads);
    return out;
}

Bytes quantize_tensor(const GgufFile& file, const std::string& name, const std::string& format_name, int64_t first_row,
                      int64_t n_rows, const std::optional<Floats>& importance, int n_threads) {
    const FormatInfo& format = format_named(format_name);
    const Tensor* tensor = file.find(name);
    check<std::invalid_argument>(tensor, file.path(), ": has no tensor ", name);
    check_threads(n_threads);
    const FormatInfo& stored = format_of(tensor->dtype);
    const int64_t n_cols = tensor->shape.back();
    const size_t stored_row = row_bytes(stored, n_cols);
    const int64_t all_rows = stored_row ? static_cast<int64_t>(tensor->n_bytes / stored_row) : 0;
    check<std::invalid_argument>(first_row >= 0 && n_rows >= 0 && first_row <= all_rows - n_rows, name, ": has ",
                                 all_rows, " rows, not ", first_row, " to ", first_row + n_rows);
    Bytes out({n_rows, static_cast<int64_t>(row_bytes(format, n_cols))});
    const float* w = check_importance(importance, n_cols);
    auto* dst = reinterpret_cast<std::byte*>(out.mutable_data());
    const uint64_t offset = tensor->offset + first_row * stored_row;
    py::gil_scoped_release release;
    if (format.dtype == tensor->dtype) {
        file.bytes().read(offset, dst, n_rows * stored_row);
        return out;
    }
    quantize_rows(
        format.dtype, name, first_row, n_rows, n_cols,
        [&](int64_t i, float* row) {
            std::vector<std::byte> raw(stored_row);
            file.bytes().read(offset + i * stored_row, raw.data(), stored_row);
            stored.decode(raw.data(), row, n_cols);
            return row;
        },
        w, dst, n_threads);
    return out;
}

}  // namespace

void register_quantize(py::module_& m) {
    m.def("quantizable", &list_quantizable, "Names of the storage formats that can be written, in formats()'s order.");
    m.def("quantize", &quantize, "format_name"_a, "x"_a, py::kw_only(), "importance"_a = py::none(), "n_threads"_a = 1,
          "Rows of weights, float32 [n_rows, n_cols], in a storage format: uint8 [n_rows, bytes of a row]. importance: "
          "float32 [n_cols], what the square of an error in each column counts. The same bytes with any number of "
          "threads. Raises InvalidRequest, ModelFormatError (a weight is not finite or too large for the format).");
    m.def("quantize_tensor", &quantize_tensor, "file"_a, "name"_a, "format_name"_a, py::kw_only(), "first_row"_a,
          "n_rows"_a, "importance"_a = py::none(), "n_threads"_a = 1,
          "The same of rows of a tensor in a file (all dimensions but the last one are rows), read as they are needed; "
          "copied where they are in that format already. Raises ModelChanged too.");
}

}  // namespace gemmart
