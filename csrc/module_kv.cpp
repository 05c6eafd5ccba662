#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "error.h"
#include "kv_cache.h"
#include "module.h"

namespace py = pybind11;
using namespace py::literals;

namespace gemmart {
namespace {

using Ids = py::array_t<int32_t, py::array::c_style>;

std::span<const int32_t> as_span(const Ids& ids) {
    check<std::invalid_argument>(ids.ndim() == 1, "ids has ", ids.ndim(), " dimensions, expected 1");
    return {ids.data(), static_cast<size_t>(ids.size())};
}

Group group_of(const std::string& name) {
    if (name == "global") return Global;
    if (name == "windowed") return Windowed;
    throw std::invalid_argument(message("group '", name, "' is unknown; use global or windowed"));
}

std::unique_ptr<KvCache> make(const std::vector<std::tuple<int, int, int>>& layers, const std::string& kv_type,
                              int64_t n_tokens, int n_sequences, int slack) {
    std::vector<KvLayer> list;
    for (auto [n_kv_heads, head_dim, window] : layers) list.push_back({n_kv_heads, head_dim, window});
    return std::make_unique<KvCache>(std::move(list), kv_type_of(kv_type), n_tokens, n_sequences, slack);
}

using Bytes = py::array_t<uint8_t, py::array::c_style>;

void check_page(const KvCache& cache, int layer, int32_t page) {
    const auto n_layers = static_cast<int>(cache.layers().size());
    check<std::invalid_argument>(layer >= 0 && layer < n_layers, "layer ", layer, " is outside 0 … ", n_layers - 1);
    const int64_t n_pages = cache.stats().n_pages[cache.group(layer)];
    check<std::invalid_argument>(page >= 0 && page < n_pages, "page ", page, " is outside 0 … ", n_pages - 1);
}

Bytes read_page(const KvCache& cache, int layer, int32_t page) {
    check_page(cache, layer, page);
    Bytes out(static_cast<py::ssize_t>(cache.part_bytes(layer)));
    auto* to = reinterpret_cast<std::byte*>(out.mutable_data());
    py::gil_scoped_release release;
    cache.read(layer, page, to);
    return out;
}

void write_page(KvCache& cache, int layer, int32_t page, const Bytes& data) {
    check_page(cache, layer, page);
    check<std::invalid_argument>(static_cast<size_t>(data.size()) == cache.part_bytes(layer), "data has ", data.size(),
                                 " bytes, expected ", cache.part_bytes(layer));
    const auto* from = reinterpret_cast<const std::byte*>(data.data());
    py::gil_scoped_release release;
    cache.write(layer, page, from);
}

py::dict stats(const KvCache& cache) {
    KvCache::Stats s = cache.stats();
    auto group = [&](Group g) {
        return py::dict("n_pages"_a = s.n_pages[g], "n_free"_a = s.n_free[g], "n_cached"_a = s.n_cached[g],
                        "page_bytes"_a = s.page_bytes[g]);
    };
    return py::dict("global"_a = group(Global), "windowed"_a = group(Windowed), "n_sequences"_a = s.n_sequences);
}

}  // namespace

void register_kv(py::module_& m) {
    m.attr("KV_PAGE_TOKENS") = kPageTokens;
    m.def(
        "kv_head_layout",
        [](const std::string& kv_type, int head_dim) {
            KvHeadLayout h = kv_head_layout(kv_type_of(kv_type), head_dim);
            return py::dict("keys"_a = h.keys, "key_scales"_a = h.key_scales, "values"_a = h.values,
                            "value_scales"_a = h.value_scales, "n_bytes"_a = h.n_bytes);
        },
        "kv_type"_a, "head_dim"_a, "Byte offsets of one kv head's matrices inside its part of a page, and its size.");

    py::class_<KvCache>(m, "KvCache",
                        "Keys and values of past tokens in pages of KV_PAGE_TOKENS positions. One thread at a time. "
                        "A sequence id that is not open raises InvalidRequest.")
        .def(py::init(&make), py::kw_only(), "layers"_a, "kv_type"_a, "n_tokens"_a, "n_sequences"_a, "slack"_a,
             "layers: (n_kv_heads, head_dim, window) each, window in tokens, 0 = unlimited. kv_type: f32, f16, bf16 or "
             "q8_0. slack: how many tokens a sequence can be trimmed back. Raises OutOfMemory, InvalidRequest.")
        .def("new_sequence", &KvCache::new_sequence, "An empty sequence's id.")
        .def("fork", &KvCache::fork, "seq"_a, "upto"_a,
             "A new sequence with the first `upto` positions of `seq`. Raises InvalidRequest where its windowed layers "
             "have given back what they see there.")
        .def("trim", &KvCache::trim, "seq"_a, "upto"_a,
             "Shortens to `upto`, or to 0 where the windowed layers have given back what they see there; returns the "
             "new length.")
        .def(
            "match_prefix",
            [](KvCache& cache, const Ids& ids, uint64_t salt) {
                KvCache::Match match = cache.match_prefix(as_span(ids), salt);
                return py::make_tuple(match.seq, match.length);
            },
            "ids"_a, "salt"_a = 0,
            "(id, length) of a new sequence with the longest prefix of `ids` (int32 [n]) that is stored under `salt`: "
            "whole pages, at most n - 1 tokens.")
        .def("restore", &KvCache::restore, "n"_a, "held_from"_a, "salt"_a,
             "A new sequence with the positions [0, n), whole pages, writable by write_page() until commit(); of "
             "its "
             "windowed pages the first `held_from` are given back. Raises OutOfMemory, InvalidRequest.")
        .def("free", &KvCache::free, "seq"_a, "Closes a sequence; its full pages stay stored until space is wanted.")
        .def("reserve", &KvCache::reserve, "seq"_a, "n"_a,
             "Makes the next `n` positions writable. Raises OutOfMemory and changes nothing where pages are missing.")
        .def(
            "commit", [](KvCache& cache, int seq, const Ids& ids) { cache.commit(seq, as_span(ids)); }, "seq"_a,
            "ids"_a, "Appends `ids` (int32 [n]), computed in reserved positions; full pages become a stored prefix.")
        .def(
            "can_hold",
            [](const KvCache& cache, const std::vector<int>& seqs, const std::vector<int>& counts) {
                return cache.can_hold(seqs, counts);
            },
            "seqs"_a, "counts"_a, "Whether reserve() of these counts, all together, would succeed; each sequence once.")
        .def("drop_cached", &KvCache::drop_cached, "Drops all stored prefixes that no open sequence holds.")
        .def("length", &KvCache::length, "seq"_a)
        .def("is_open", &KvCache::is_open, "seq"_a)
        .def(
            "pages",
            [](const KvCache& cache, int seq, const std::string& group) {
                std::span<const int32_t> pages = cache.pages(seq, group_of(group));
                return py::array_t<int32_t>(static_cast<py::ssize_t>(pages.size()), pages.data());
            },
            "seq"_a, "group"_a,
            "Page ids in order of position, int32 [n_pages], -1 where given back; group: global or windowed.")
        .def("part_bytes", &KvCache::part_bytes, "layer"_a, "Of a layer's part of a page.")
        .def(
            "read_page", &read_page, "layer"_a, "page"_a,
            "A copy of a layer's part of a page, uint8 [part_bytes(layer)], wherever it is kept. For pages that nobody "
            "computes; then it may run beside other threads.")
        .def("write_page", &write_page, "layer"_a, "page"_a, "data"_a,
             "Changes it, for every sequence that holds the page.")
        .def("stats", &stats,
             "A dict: for global and windowed a dict of n_pages, n_free, n_cached (held only as stored prefix), "
             "page_bytes; and n_sequences.");
}

}  // namespace gemmart
