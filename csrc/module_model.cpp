#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <limits>
#include <numeric>

#include "check_weights.h"
#include "error.h"
#include "model.h"
#include "module.h"

namespace py = pybind11;
using namespace py::literals;

namespace gemmart {
namespace {

using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

template <typename T>
std::span<const T> as_span(const py::array_t<T, py::array::c_style | py::array::forcecast>& a) {
    return {a.data(), static_cast<size_t>(a.size())};
}

py::dict info(const ModelFacts& facts) {
    const Config& c = facts.config;
    py::list layers;
    for (const LayerFacts& l : c.layers)
        layers.append(py::dict("n_heads"_a = l.n_heads, "n_kv_heads"_a = l.n_kv_heads, "head_dim"_a = l.head_dim,
                               "ffn_dim"_a = l.ffn_dim, "window"_a = l.window, "query_scale"_a = l.query_scale));
    return py::dict("family"_a = c.family, "dim"_a = c.dim, "n_vocab"_a = c.n_vocab, "n_ctx_train"_a = c.n_ctx_train,
                    "attention_softcap"_a = c.attention_softcap, "final_softcap"_a = c.final_softcap,
                    "tied_output"_a = c.tied_output, "layers"_a = layers);
}

// The last n_layers layers of a model.
GpuShare share(const ModelFacts& facts, int n_layers, bool head) {
    const auto n = static_cast<int>(facts.config.layers.size());
    check<std::invalid_argument>(n_layers >= 0 && n_layers <= n, "n_gpu_layers is ", n_layers, ", expected 0 to ", n);
    check<std::invalid_argument>(!head || n_layers > 0, "the head cannot be on a GPU alone");
    return {n_layers, head};
}

py::dict need(const ModelFacts& facts, int n_threads, int n_batch, int64_t n_kv_tokens, int n_sequences,
              const std::string& kv_type, int n_gpu_layers, bool gpu_head) {
    const MemoryNeed m = memory_need(facts, n_threads, n_batch, n_kv_tokens, n_sequences, kv_type_of(kv_type),
                                     share(facts, n_gpu_layers, gpu_head));
    return py::dict("packed_weights"_a = m.packed_weights, "mapped_weights"_a = m.mapped_weights,
                    "buffers"_a = m.buffers, "kv"_a = m.kv);
}

py::dict need_of_gpu(const ModelFacts& facts, const GpuModule& module, int n_layers, bool head, int n_batch,
                     int64_t n_kv_tokens, int n_sequences, const std::string& kv_type, int n_behind) {
    share(facts, n_layers + n_behind, head);
    const int first = static_cast<int>(facts.config.layers.size()) - n_layers - n_behind;
    const GemmartNeed n =
        gpu_need(facts, module, first, n_layers, head, n_batch, n_kv_tokens, n_sequences, kv_type_of(kv_type));
    return py::dict("weights"_a = n.weights, "buffers"_a = n.buffers, "kv"_a = n.kv);
}

// Of (module, device, number of layers), in order.
std::vector<GpuPart> gpu_parts(const ModelFacts& facts,
                               const std::vector<std::tuple<std::shared_ptr<GpuModule>, int, int>>& list, bool head,
                               bool own_gemm) {
    int first = static_cast<int>(facts.config.layers.size());
    for (const auto& [module, device, n_layers] : list) first -= n_layers;
    std::vector<GpuPart> parts;
    for (const auto& [module, device, n_layers] : list) {
        parts.push_back({module, device, first, n_layers, false, own_gemm});
        first += n_layers;
    }
    if (!parts.empty()) parts.back().head = head;
    return parts;
}

py::dict build_of(const GpuModule& module) {
    const GemmartBuild b = module.build();
    return py::dict("backend"_a = b.backend, "version"_a = b.version, "compiler"_a = b.compiler, "archs"_a = b.archs,
                    "gemm"_a = b.gemm);
}

py::list devices_of(const GpuModule& module) {
    std::vector<GemmartDevice> found;
    {
        py::gil_scoped_release release;
        found = module.devices();
    }
    py::list out;
    for (const GemmartDevice& d : found)
        out.append(py::dict("name"_a = d.name, "arch"_a = d.arch, "total_bytes"_a = d.total_bytes,
                            "free_bytes"_a = d.free_bytes, "n_units"_a = d.n_units, "usable"_a = d.usable != 0,
                            "problem"_a = d.problem));
    return out;
}

py::dict input_squares(Model& model) {
    std::vector<cpu::InputSquares::Sums> all;
    {
        py::gil_scoped_release release;
        all = model.input_squares();
    }
    py::dict out;
    for (const auto& sums : all)
        for (const std::string& name : sums.names)
            out[py::str(name)] =
                py::make_tuple(py::array_t<double>(sums.squares.size(), sums.squares.data()), sums.n_rows);
    return out;
}

std::vector<bool> forward(Context& context, const Ids& tokens, const std::vector<std::pair<int, int>>& runs,
                          const std::vector<int>& outputs, const std::vector<int>& hidden) {
    std::vector<Context::Run> list;
    for (auto [seq, n_tokens] : runs) list.push_back({seq, n_tokens});
    py::gil_scoped_release release;
    return context.forward(as_span(tokens), list, outputs, hidden);
}

Floats row_of(Context& context, int output) {
    Floats out(context.n_vocab());
    std::copy_n(context.logits(output), context.n_vocab(), out.mutable_data());
    return out;
}

Floats all_rows(Context& context) {
    Floats out({context.n_outputs(), context.n_vocab()});
    for (int i = 0; i < context.n_outputs(); ++i)
        std::copy_n(context.logits(i), context.n_vocab(), out.mutable_data(i, 0));
    return out;
}

Floats hidden_rows(const Context& context) {
    const std::span<const float> rows = context.hidden();
    Floats out({static_cast<py::ssize_t>(rows.size()) / context.dim(), static_cast<py::ssize_t>(context.dim())});
    std::copy(rows.begin(), rows.end(), out.mutable_data());
    return out;
}

py::tuple select_row(Context& context, int output, int k, const Ids& bias_ids, const Floats& bias, const Ids& recent,
                     float repeat_penalty, float presence_penalty, float frequency_penalty, const Ids& mask) {
    check<std::invalid_argument>(bias_ids.size() == bias.size(), "bias_ids has ", bias_ids.size(), " elements, bias ",
                                 bias.size());
    const Adjustments adjust{as_span(bias_ids), as_span(bias),     as_span(recent), repeat_penalty,
                             presence_penalty,  frequency_penalty, as_span(mask)};
    Candidates best;
    {
        py::gil_scoped_release release;
        best = context.select(output, k, adjust);
    }
    return py::make_tuple(Ids(best.ids.size(), best.ids.data()), Floats(best.logits.size(), best.logits.data()),
                          best.logsumexp);
}

}  // namespace

void register_model(py::module_& m) {
    m.attr("KV_SLACK") = Context::kSlack;
    m.attr("KV_CHUNK") = KvCache::kChunk;

    py::class_<ModelFacts>(m, "ModelFacts",
                           "What a GGUF file announces of its model, from its metadata and tensor table alone.")
        .def(py::init([](const py::args& parts) {
                 std::vector<Range> ranges = ranges_of(parts);
                 py::gil_scoped_release release;
                 return std::make_unique<ModelFacts>(std::move(ranges));
             }),
             "Of the file in these parts, which are as Gguf takes them. Raises ModelNotFound, ModelFormatError, "
             "TruncatedModel, UnsupportedModel.")
        .def("info", &info, "family, dim, n_vocab, n_ctx_train, caps, and a dict a layer.")
        .def("memory_need", &need, py::kw_only(), "n_threads"_a, "n_batch"_a, "n_kv_tokens"_a, "n_sequences"_a,
             "kv_type"_a, "n_gpu_layers"_a = 0, "gpu_head"_a = false,
             "Bytes of this machine's memory that a model and a context take: packed_weights, or mapped_weights; "
             "buffers; kv (all pages in use); without the last n_gpu_layers layers, and the head, which are on a GPU.")
        .def("gpu_need", &need_of_gpu, "module"_a, py::kw_only(), "n_layers"_a, "head"_a, "n_batch"_a, "n_kv_tokens"_a,
             "n_sequences"_a, "kv_type"_a, "n_behind"_a = 0,
             "Bytes of a GPU's memory that n_layers layers, and the head, take there: weights, buffers, kv. n_behind: "
             "how many layers come after these. Without logits: 4 · n_vocab for each row that a forward asks for.");

    py::class_<GpuModule, std::shared_ptr<GpuModule>>(m, "GpuModule", "A shared library that computes on GPUs.")
        .def(py::init<const std::string&>(), "path"_a, py::call_guard<py::gil_scoped_release>(),
             "Opens it. Raises DeviceError where it is none, or was built for another version of the border.")
        .def_property_readonly("path", &GpuModule::path)
        .def("build", &build_of, "backend, version, compiler, archs, gemm.")
        .def("devices", &devices_of,
             "A dict each: name, arch, total_bytes, free_bytes, n_units, usable, problem. Raises DeviceError.");

    py::class_<Loading>(m, "Loading", "What other threads may see and want of a load.")
        .def(py::init<>())
        .def_property_readonly(
            "done", [](const Loading& self) { return self.done.load(); }, "Bytes read.")
        .def_property_readonly(
            "total", [](const Loading& self) { return self.total.load(); }, "Bytes to read.")
        .def("cancel", [](Loading& self) { self.cancelled = true; }, "The load ends soon, with Cancelled.");

    m.def(
        "check_weights",
        [](const ModelFacts& facts, int n_threads, Loading& loading) {
            check<std::invalid_argument>(n_threads >= 1 && n_threads <= 1024, "n_threads is ", n_threads,
                                         ", expected 1 to 1024");
            py::gil_scoped_release release;
            check_weights(*facts.file, n_threads, loading);
        },
        "facts"_a, py::kw_only(), "n_threads"_a, "loading"_a,
        "Decodes every tensor of a file. Raises NumericError that names the first weight that is NaN or infinite; "
        "Cancelled, ModelChanged.");

    py::class_<Model, std::shared_ptr<Model>>(m, "Model", "Weights in memory, and the threads that compute with them.")
        .def(
            py::init([](const ModelFacts& facts, int n_threads, int n_batch, bool precise, bool mapped,
                        size_t cache_bytes, bool locked,
                        const std::vector<std::tuple<std::shared_ptr<GpuModule>, int, int>>& gpu, bool gpu_head,
                        bool own_gemm, Loading* loading) {
                check<std::invalid_argument>(n_threads >= 1 && n_threads <= 1024, "n_threads is ", n_threads,
                                             ", expected 1 to 1024");
                check<std::invalid_argument>(n_batch >= 1 && n_batch <= 65536, "n_batch is ", n_batch,
                                             ", expected 1 to 65536");
                Loading unseen;
                return std::make_shared<Model>(facts, n_threads, n_batch, precise,
                                               cpu::WeightOptions{mapped, cache_bytes, locked},
                                               gpu_parts(facts, gpu, gpu_head, own_gemm), loading ? *loading : unseen);
            }),
            "facts"_a, py::kw_only(), "n_threads"_a, "n_batch"_a, "precise"_a, "mapped"_a = false,
            "cache_bytes"_a = std::numeric_limits<size_t>::max(), "locked"_a = false,
            "gpu"_a = std::vector<std::tuple<std::shared_ptr<GpuModule>, int, int>>(), "gpu_head"_a = false,
            "own_gemm"_a = false, "loading"_a = nullptr, py::call_guard<py::gil_scoped_release>(),
            "Reads and packs the weights; mapped: leaves them in the file and packs what a product needs; cache_bytes: "
            "how much of the file may stay in the system's cache; locked: they are locked in memory. n_batch: most "
            "tokens of a forward; precise: "
            "activations keep nearly their float32 precision. gpu: (module, device, n_layers) for each run of the last "
            "layers, in order; gpu_head: the output matrix is on the last of these too; own_gemm: no library's GEMM is "
            "used. Raises OutOfMemory, ModelChanged, Cancelled, "
            "DeviceError.")
        .def_property_readonly("isa", [](const Model& model) { return model.kernels().isa; })
        .def("time_phases", &Model::time_phases, "on"_a, py::call_guard<py::gil_scoped_release>(),
             "Measures from now on, anew, where the time of each forward goes; or no more.")
        .def(
            "phase_times",
            [](Model& model) {
                std::vector<cpu::PhaseTime> times;
                {
                    py::gil_scoped_release release;
                    times = model.phase_times();
                }
                py::dict out;
                for (const auto& [name, seconds] : times) out[name] = seconds;
                return out;
            },
            "Seconds by name of phase since time_phases(True), in the order in which they run; empty where it is off.")
        .def("sum_input_squares", &Model::sum_input_squares, "on"_a, py::call_guard<py::gil_scoped_release>(),
             "Sums from now on, anew, the squares of what each matrix of the layers is multiplied with; or no more.")
        .def("input_squares", &input_squares,
             "By name of a layer's matrix since sum_input_squares(True): (float64 [n_cols] sums, rows summed); empty "
             "where it is off. The output matrix is not among them.");

    py::class_<Context>(
        m, "Context",
        "Sequences that run on a model. One call at a time. A sequence id that is not open raises InvalidRequest.")
        .def(py::init(
                 [](std::shared_ptr<Model> model, int64_t n_kv_tokens, int n_sequences, const std::string& kv_type) {
                     return std::make_unique<Context>(std::move(model), n_kv_tokens, n_sequences, kv_type_of(kv_type));
                 }),
             "model"_a, py::kw_only(), "n_kv_tokens"_a, "n_sequences"_a, "kv_type"_a,
             "Room for n_kv_tokens positions, shared by all sequences. kv_type: f16, bf16, f32 or q8_0.")
        .def("forward", &forward, "tokens"_a, "runs"_a, "outputs"_a, "hidden"_a = std::vector<int>(),
             "Appends `tokens` (int32 [n_tokens]) to sequences, run by run of (seq, n_tokens), and computes the logits "
             "of the rows `outputs` "
             "and the states behind the last norm of the rows `hidden` (both ascending, no row in both). Returns for "
             "each of these whether it is finite, outputs first. Releases the GIL. Raises InvalidRequest or "
             "OutOfMemory; "
             "nothing is changed then.")
        .def("logits", &all_rows,
             "Logits of the last forward, float32 [n_outputs, n_vocab], soft-capped, unnormalised.")
        .def("hidden", &hidden_rows,
             "States of the last forward, float32 [n_hidden, dim]: what the output matrix is multiplied with.")
        .def("row", &row_of, "output"_a, "One row of them, float32 [n_vocab].")
        .def(
            "select", &select_row, "output"_a, "k"_a, py::kw_only(), "bias_ids"_a = Ids(0), "bias"_a = Floats(0),
            "recent"_a = Ids(0), "repeat_penalty"_a = 1.f, "presence_penalty"_a = 0.f, "frequency_penalty"_a = 0.f,
            "mask"_a = Ids(0),
            "(ids int32 [k], logits float32 [k], logsumexp): the k best of one row after bias and penalties, "
            "descending, ties by lower id; "
            "logsumexp of the whole adjusted row. mask: int32 [ceil(n_vocab / 32)], of which bit i % 32 of word i / 32 "
            "allows token i; the others are as if the row did not have them. Empty: all are allowed.")
        .def_property_readonly("kv", &Context::kv, py::return_value_policy::reference_internal,
                               "The KvCache of its sequences.");
}

}  // namespace gemmart
