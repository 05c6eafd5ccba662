// The border: conversions, documentation, the GIL and error mapping; no arithmetic.
#include "module.h"

#include <cstring>
#include <new>

#include "error.h"

namespace py = pybind11;

namespace gemmart {
namespace {

// Called with an active C++ exception; the classes are those of gemmart.errors.
void raise_in_python(std::exception_ptr error) {
    if (!error) return;
    auto raise = [](const char* name, const char* what) {
        py::object cls = py::module_::import("gemmart.errors").attr(name);
        // A path in it need not be UTF-8.
        PyObject* text = PyUnicode_DecodeUTF8(what, static_cast<Py_ssize_t>(std::strlen(what)), "backslashreplace");
        if (!text) return;  // with its own error
        PyErr_SetObject(cls.ptr(), text);
        Py_DECREF(text);
    };
    try {
        std::rethrow_exception(error);
    } catch (const TruncatedError& e) {
        raise("TruncatedModel", e.what());
    } catch (const FormatError& e) {
        raise("ModelFormatError", e.what());
    } catch (const UnsupportedError& e) {
        raise("UnsupportedModel", e.what());
    } catch (const FileChanged& e) {
        raise("ModelChanged", e.what());
    } catch (const NumericError& e) {
        raise("NumericError", e.what());
    } catch (const DeviceError& e) {
        raise("DeviceError", e.what());
    } catch (const Cancelled& e) {
        raise("Cancelled", e.what());
    } catch (const OutOfMemory& e) {
        raise("OutOfMemory", e.what());
    } catch (const NotFound& e) {
        raise("ModelNotFound", e.what());
    } catch (const std::invalid_argument& e) {
        raise("InvalidRequest", e.what());
    } catch (const std::bad_alloc&) {
        raise("OutOfMemory", "out of memory");
    } catch (const py::builtin_exception&) {
        throw;  // index_error, stop_iteration …: pybind11 knows them
    } catch (const py::error_already_set&) {
        throw;
    } catch (const std::exception& e) {
        raise("InternalError", e.what());
    }
}

}  // namespace
}  // namespace gemmart

PYBIND11_MODULE(_core, m) {
    m.doc() = "The C++ core of gemmart.";
    m.attr("version") = GEMMART_VERSION;
    py::register_local_exception_translator(gemmart::raise_in_python);
    gemmart::register_gguf(m);
    gemmart::register_kv(m);
    gemmart::register_kernels(m);
    gemmart::register_model(m);
    gemmart::register_quantize(m);
}
