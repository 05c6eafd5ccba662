// _core.kernels: every kernel of every ISA on NumPy arrays, for tests and `gemmart bench --kernels`.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "cpu/activations.h"
#include "cpu/bandwidth.h"
#include "cpu/kernel_bench.h"
#include "cpu/kernels.h"
#include "cpu/peak.h"
#include "error.h"
#include "module.h"

namespace py = pybind11;

namespace gemmart {
namespace {

using namespace cpu;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Raw = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;

constexpr int kRedZone = 32;  // NaN behind what a kernel writes

struct AlignedBytes {
    std::unique_ptr<std::byte, void (*)(void*)> bytes{nullptr,
                                                      [](void* p) { ::operator delete(p, std::align_val_t(64)); }};
    explicit AlignedBytes(size_t n) {
        bytes.reset(static_cast<std::byte*>(::operator new(n + 64, std::align_val_t(64))));
    }
    std::byte* get() { return bytes.get(); }
};

const FormatInfo& format_named(const std::string& name) {
    for (const FormatInfo& f : formats())
        if (name == f.name) return f;
    throw std::invalid_argument(message("format: ", name, " is unknown"));
}

// Activations of x [n_tokens, n_cols], packed by one ISA's kernels.
OwnedActivations pack(const Kernels& kernels, const Floats& x, bool two_terms) {
    check<std::invalid_argument>(x.ndim() == 2 && x.shape(1) % kGroup == 0,
                                 "x must be [n_tokens, n_cols], n_cols a multiple of ", kGroup);
    return {kernels, static_cast<int>(x.shape(0)), static_cast<int>(x.shape(1)), two_terms,
            [&](int i) { return x.data(i, 0); }};
}

// Rows of a format, packed into panels where the format has a packed layout and `packed` asks for it.
struct Weights {
    AlignedBytes bytes;
    Matrix view;

    Weights(const FormatInfo& format, const Raw& rows, int n_cols, bool packed)
        : bytes(needed(format, rows, n_cols, packed)) {
        const int n_rows = static_cast<int>(rows.shape(0));
        const size_t stride = row_bytes(format, n_cols);
        const size_t panel = packed ? panel_bytes(format.dtype, n_cols) : 0;
        if (panel)
            for (int row = 0; row < n_rows; row += kPanel)
                pack_panel(format.dtype, reinterpret_cast<const std::byte*>(rows.data(row, 0)), stride,
                           std::min(kPanel, n_rows - row), n_cols, bytes.get() + row / kPanel * panel);
        else
            std::memcpy(bytes.get(), rows.data(), stride * n_rows);
        view = {format.dtype, panel != 0, n_rows, n_cols, bytes.get(), panel ? panel : stride};
    }

    static size_t needed(const FormatInfo& format, const Raw& rows, int n_cols, bool packed) {
        check<std::invalid_argument>(
            rows.ndim() == 2 && static_cast<size_t>(rows.shape(1)) == row_bytes(format, n_cols) &&
                n_cols % format.block_size == 0 && n_cols % kGroup == 0,
            "weights must be bytes [n_rows, bytes of ", n_cols, " columns in ", format.name, "]");
        const size_t n_panels = (rows.shape(0) + kPanel - 1) / kPanel;
        return packed && panel_bytes(format.dtype, n_cols) ? n_panels * panel_bytes(format.dtype, n_cols)
                                                           : rows.shape(0) * rows.shape(1);
    }
};

Floats matmul(const std::string& isa, const std::string& format, const Raw& weights, const Floats& x, bool packed,
              bool two_terms, std::vector<int> panels) {
    const Kernels& kernels = kernels_for(isa);
    const OwnedActivations activations = pack(kernels, x, two_terms);
    Weights w(format_named(format), weights, activations.view.n_cols, packed);
    const int n_panels = (w.view.n_rows + kPanel - 1) / kPanel;
    if (panels.empty()) panels = {0, n_panels};
    check<std::invalid_argument>(
        panels.size() == 2 && panels[0] >= 0 && panels[0] <= panels[1] && panels[1] <= n_panels,
        "panels must be (begin, end) within ", n_panels);
    // A kernel that writes beside the result is caught by the caller, which sees the red zones too.
    const size_t ld = w.view.n_rows + kRedZone;
    Floats out({static_cast<py::ssize_t>(activations.view.n_tokens), static_cast<py::ssize_t>(ld)});
    std::fill_n(out.mutable_data(), out.size(), std::numeric_limits<float>::quiet_NaN());
    AlignedBytes scratch(kScratchBytes);
    float* to = out.mutable_data();
    {
        py::gil_scoped_release release;
        kernels.matmul(w.view, activations.view, panels[0], panels[1], to, ld, scratch.get());
    }
    return out;
}

py::dict quantize(const std::string& isa, const Floats& x, bool two_terms) {
    const OwnedActivations packed = pack(kernels_for(isa), x, two_terms);
    const int n_tokens = packed.view.n_tokens, n_cols = packed.view.n_cols;
    // Back to one row a token.
    auto rows = [&](const auto& from, int elements, int unit) {
        using T = std::decay_t<decltype(from[0])>;
        py::array_t<T> out({n_tokens, elements});
        for (int c = 0, w; c < n_tokens; c += w) {
            w = column_group_width(n_tokens - c);
            for (int i = 0; i < w; ++i)
                for (int k = 0; k < elements; ++k)
                    out.mutable_at(c + i, k) = from[static_cast<size_t>(c) * elements +
                                                    (static_cast<size_t>(k / unit) * w + i) * unit + k % unit];
        }
        return out;
    };
    py::dict out;
    out["q"] = rows(packed.q, n_cols, kGroup);
    if (two_terms) out["q_low"] = rows(packed.q_low, n_cols, kGroup);
    out["d"] = rows(packed.d, n_cols / 32, 1);
    out["significand"] = rows(packed.significand, n_cols / 32, 1);
    out["exponent"] = rows(packed.exponent, n_cols / 32, 1);
    out["ds32"] = rows(packed.ds32, n_cols / 32, 1);
    out["ds16"] = rows(packed.ds16, n_cols / 16, 1);
    out["s32"] = rows(packed.s32, n_cols / 32, 1);
    out["s16"] = rows(packed.s16, n_cols / 16, 1);
    out["x"] = rows(packed.x, n_cols, 1);
    return out;
}

// Rows for a kernel to write, with a red zone of NaN behind each.
class GuardedRows {
  public:
    GuardedRows(size_t n_rows, size_t n) : n_(n), rows_(n_rows * (n + kRedZone), kUntouched) {}
    explicit GuardedRows(const Floats& x) : GuardedRows(1, x.size()) { std::copy_n(x.data(), x.size(), rows_.data()); }
    float* row(size_t i) { return rows_.data() + i * (n_ + kRedZone); }
    // The rows in an array of this shape; throws where a kernel wrote beside them.
    Floats result(std::vector<py::ssize_t> shape) {
        check_red_zones();
        Floats out(std::move(shape));
        for (size_t i = 0; i < rows_.size() / (n_ + kRedZone); ++i)
            std::copy_n(row(i), n_, out.mutable_data() + i * n_);
        return out;
    }
    void check_red_zones() {
        for (size_t i = 0; i < rows_.size() / (n_ + kRedZone); ++i)
            for (size_t k = n_; k < n_ + kRedZone; ++k)
                check<std::logic_error>(std::isnan(row(i)[k]), "the kernel wrote ", k - n_, " numbers beyond row ", i);
    }

  private:
    static constexpr float kUntouched = std::numeric_limits<float>::quiet_NaN();
    size_t n_;
    std::vector<float> rows_;
};

std::vector<py::ssize_t> shape_of(const Floats& x) { return {x.shape(), x.shape() + x.ndim()}; }

// kernel(out), where out holds a copy of x.
template <class F>
Floats changed_copy(const Floats& x, F kernel) {
    GuardedRows out(x);
    kernel(out.row(0));
    return out.result(shape_of(x));
}

void check_size(const char* name, const Floats& array, py::ssize_t wanted) {
    check<std::invalid_argument>(array.size() == wanted, name, " has ", array.size(), " numbers, expected ", wanted);
}

// Stores keys and values [n_pos, head_dim], then attends with queries [n_rows, head_dim] at `positions` [n_rows].
Floats attention(const std::string& isa, const std::string& kv_type, const Floats& keys, const Floats& values,
                 const Floats& queries, const std::vector<int>& positions, int window, float softcap, bool split) {
    const Kernels& kernels = kernels_for(isa);
    check<std::invalid_argument>(keys.ndim() == 2 && values.ndim() == 2 && queries.ndim() == 2,
                                 "keys, values and queries must be [n, head_dim]");
    const int n_pos = static_cast<int>(keys.shape(0)), head_dim = static_cast<int>(keys.shape(1));
    const int n_rows = static_cast<int>(queries.shape(0));
    check_size("values", values, keys.size());
    check_size("queries", queries, static_cast<py::ssize_t>(positions.size()) * head_dim);
    const KvType type = kv_type_of(kv_type);
    const KvHeadLayout layout = kv_head_layout(type, head_dim);
    const int n_pages = (n_pos + kPageTokens - 1) / kPageTokens;
    AlignedBytes cache(n_pages * layout.n_bytes), scratch(kScratchBytes);
    // NaN in every type: what was not stored must not reach a result.
    std::memset(cache.get(), 0xff, n_pages * layout.n_bytes);
    for (int p = 0; p < n_pos; ++p)
        kernels.store_kv(type, layout, head_dim, keys.data(p, 0), values.data(p, 0), p % kPageTokens,
                         cache.get() + p / kPageTokens * layout.n_bytes);
    std::vector<const float*> rows(n_rows);
    std::vector<const std::byte*> pages(n_pages, nullptr);  // those that no row sees stay null
    for (int r = 0; r < n_rows; ++r) {
        const int last = positions[r];
        check<std::invalid_argument>(last >= 0 && last < n_pos, "position ", last, " is not stored");
        rows[r] = queries.data(r, 0);
        for (int i = (window && last >= window ? last - window + 1 : 0) / kPageTokens; i <= last / kPageTokens; ++i)
            pages[i] = cache.get() + i * layout.n_bytes;
    }
    const int n_ranges = (n_pos + kRange - 1) / kRange, n_partials = split ? n_ranges : 1,
              size = partial_size(head_dim);
    GuardedRows partials(n_rows, static_cast<size_t>(n_partials) * size), out(n_rows, head_dim);
    {
        py::gil_scoped_release release;
        for (int i = 0; i < n_partials; ++i)
            for (int r = 0; r < n_rows; r += kMaxAttentionRows)
                kernels.attention({type, layout, head_dim, std::min(kMaxAttentionRows, n_rows - r), rows.data() + r,
                                   positions.data() + r, window, softcap, pages.data(), split ? i : 0,
                                   split ? i + 1 : n_ranges, partials.row(r) + static_cast<size_t>(i) * size,
                                   static_cast<size_t>(partials.row(1) - partials.row(0))},
                                  scratch.get());
        for (int r = 0; r < n_rows; ++r) kernels.merge(partials.row(r), n_partials, head_dim, out.row(r));
    }
    partials.check_red_zones();
    return out.result(shape_of(queries));
}

}  // namespace

void register_kernels(py::module_& parent) {
    py::module_ m = parent.def_submodule(
        "kernels",
        "Every kernel of every ISA on arrays, for tests and benchmarks. isa \"\": the best one, or GEMMART_ISA.");
    m.def(
        "isas",
        [] {
            py::list out;
            for (const IsaStatus& s : isas()) out.append(py::make_tuple(s.name, s.built, s.usable, s.why_not));
            return out;
        },
        "[(name, built, usable, why not)], weakest first.");
    m.def(
        "running_isa", [](const std::string& isa) { return std::string(kernels_for(isa).isa); }, py::arg("isa") = "",
        "Name of the ISA whose kernels are used; raises DeviceError where GEMMART_ISA names one that cannot be.");
    m.def("read_bandwidth", read_bandwidth, py::arg("n_bytes"), py::arg("n_threads"),
          py::call_guard<py::gil_scoped_release>(),
          "Bytes a second at which n_threads threads read n_bytes from huge pages: the best of several passes.");
    m.def(
        "multiply_peak",
        [](const std::string& isa, const std::string& numbers, int n_threads) {
            check<std::invalid_argument>(numbers == "int8" || numbers == "float", "numbers must be int8 or float, not ",
                                         numbers);
            return multiply_peak(kernels_for(isa), numbers == "int8", n_threads);
        },
        py::arg("isa"), py::arg("numbers"), py::arg("n_threads"), py::call_guard<py::gil_scoped_release>(),
        "Multiplications a second that n_threads threads reach with the ISA's own instructions on numbers in "
        "registers, int8 or float: the best of several passes.");
    m.def(
        "has_panels", [](const std::string& format) { return panel_bytes(format_named(format).dtype, kBlock) != 0; },
        py::arg("format"), "Whether the format has a packed layout.");
    m.def("matmul", matmul, py::arg("isa"), py::arg("format"), py::arg("weights"), py::arg("x"), py::kw_only(),
          py::arg("packed") = true, py::arg("two_terms") = false, py::arg("panels") = std::vector<int>{},
          "weights uint8 [n_rows, row bytes], x [n_tokens, n_cols] -> float32 [n_tokens, n_rows + 32]: the product, "
          "then a red zone of NaN.");
    m.def("quantize", quantize, py::arg("isa"), py::arg("x"), py::kw_only(), py::arg("two_terms") = false,
          "x [n_tokens, n_cols] -> {q, d, significand, exponent, ds32, ds16, s32, s16, x}, with two terms q_low too, a "
          "row a "
          "token (csrc/cpu/layout.h).");
    m.def(
        "rms_norm",
        [](const std::string& isa, const Floats& x, const Floats& weight, float eps) {
            check_size("weight", weight, x.size());
            const int n = static_cast<int>(x.size());
            return changed_copy(x, [&](float* out) { kernels_for(isa).rms_norm(out, weight.data(), n, eps, out); });
        },
        py::arg("isa"), py::arg("x"), py::arg("weight"), py::arg("eps"));
    m.def(
        "add",
        [](const std::string& isa, const Floats& x, const Floats& y) {
            check_size("y", y, x.size());
            const int n = static_cast<int>(x.size());
            return changed_copy(x, [&](float* out) { kernels_for(isa).add(out, y.data(), n); });
        },
        py::arg("isa"), py::arg("x"), py::arg("y"));
    m.def(
        "scale",
        [](const std::string& isa, const Floats& x, float s) {
            const int n = static_cast<int>(x.size());
            return changed_copy(x, [&](float* out) { kernels_for(isa).scale(out, s, n); });
        },
        py::arg("isa"), py::arg("x"), py::arg("s"));
    m.def(
        "gate",
        [](const std::string& isa, const std::string& act, const Floats& gate, const Floats& up) {
            check<std::invalid_argument>(act == "gelu" || act == "silu", "act must be gelu or silu, not ", act);
            check_size("up", up, gate.size());
            const Activation activation = act == "gelu" ? Activation::Gelu : Activation::Silu;
            const int n = static_cast<int>(gate.size());
            return changed_copy(gate, [&](float* out) { kernels_for(isa).gate(activation, out, up.data(), n, out); });
        },
        py::arg("isa"), py::arg("act"), py::arg("gate"), py::arg("up"));
    m.def(
        "softcap",
        [](const std::string& isa, const Floats& x, float cap) {
            const int n = static_cast<int>(x.size());
            return changed_copy(x, [&](float* out) { kernels_for(isa).softcap(out, n, cap); });
        },
        py::arg("isa"), py::arg("x"), py::arg("cap"));
    m.def(
        "all_finite",
        [](const std::string& isa, const Floats& x) {
            return kernels_for(isa).all_finite(x.data(), static_cast<int>(x.size()));
        },
        py::arg("isa"), py::arg("x"));
    m.def(
        "find_above",
        [](const std::string& isa, const Floats& x, int begin, float limit) {
            check<std::invalid_argument>(begin >= 0, "begin is ", begin, ", expected at least 0");
            return kernels_for(isa).find_above(x.data(), begin, static_cast<int>(x.size()), limit);
        },
        py::arg("isa"), py::arg("x"), py::arg("begin"), py::arg("limit"));
    m.def(
        "sum_exp",
        [](const std::string& isa, const Floats& x, float from) {
            return kernels_for(isa).sum_exp(x.data(), static_cast<int>(x.size()), from);
        },
        py::arg("isa"), py::arg("x"), py::arg("from_"));
    m.def(
        "rope",
        [](const std::string& isa, const Floats& x, const Floats& cosines, const Floats& sines, bool neox) {
            const int n = static_cast<int>(x.size());
            check<std::invalid_argument>(n % 2 == 0, "x has ", n, " numbers, expected an even count");
            check_size("cosines", cosines, n / 2);
            check_size("sines", sines, n / 2);
            return changed_copy(x,
                                [&](float* out) { kernels_for(isa).rope(out, cosines.data(), sines.data(), n, neox); });
        },
        py::arg("isa"), py::arg("x"), py::arg("cosines"), py::arg("sines"), py::arg("neox"));
    using Time = std::tuple<double, double, double>;
    const auto as_tuple = [](const KernelTime& t) { return Time{t.seconds, t.n_bytes, t.n_products}; };
    py::class_<KernelBench>(m, "Bench", "How fast single kernels are, on made-up numbers.")
        .def(py::init([](const std::string& isa, int n_threads, size_t n_bytes) {
                 return std::make_unique<KernelBench>(kernels_for(isa), n_threads, n_bytes);
             }),
             py::arg("isa"), py::kw_only(), py::arg("n_threads"), py::arg("n_bytes"),
             py::call_guard<py::gil_scoped_release>(),
             "n_bytes: of the memory that passes read; more than the caches hold, where reading is to be measured.")
        .def(
            "matmul",
            [=](KernelBench& bench, const std::string& format, int n_tokens) {
                return as_tuple(bench.matmul(format_named(format).dtype, n_tokens));
            },
            py::arg("format"), py::arg("n_tokens"), py::call_guard<py::gil_scoped_release>(),
            "(seconds, bytes of weights, multiplications) of the quickest pass with n_tokens columns.")
        .def(
            "attention",
            [=](KernelBench& bench, const std::string& kv_type, int n_tokens) {
                return as_tuple(bench.attention(kv_type_of(kv_type), n_tokens));
            },
            py::arg("kv_type"), py::arg("n_tokens"), py::call_guard<py::gil_scoped_release>(),
            "The same of attention: the last n_tokens (1 to 32) of 8192 positions, two query rows each, heads of 256.")
        .def("vectors", &KernelBench::vectors, py::call_guard<py::gil_scoped_release>(),
             "[(name, numbers a second on one thread)] of the element-wise kernels.");
    m.def("attention", attention, py::arg("isa"), py::arg("kv_type"), py::arg("keys"), py::arg("values"),
          py::arg("queries"), py::arg("positions"), py::kw_only(), py::arg("window") = 0, py::arg("softcap") = 0.f,
          py::arg("split") = false,
          "Stores keys and values [n_pos, head_dim] in pages, attends with queries [n_rows, head_dim] -> [n_rows, "
          "head_dim]. split: each range of positions by itself, then merged.");
}

}  // namespace gemmart
