// Keys, values and logits of a context's sequences.
#include <algorithm>
#include <cstring>

#include "cuda/executor.cuh"
#include "error.h"

namespace gemmart::gpu {

Context::Context(Executor& executor, const GemmartKv& kv)
    : executor_(executor),
      type_(static_cast<KvType>(kv.type)),
      n_pages_{kv.n_pages[0], kv.n_pages[1]},
      layout_(page_layout(executor.weights.layers, type_)) {
    check_device(cudaSetDevice(executor.device), "choosing the device");
    for (int group : {Global, Windowed}) {
        pages_[group] = DeviceMemory(n_pages_[group] * layout_.page_bytes[group], "keys and values");
        // What was there before could be no number, and products with a weight of 0 would show it.
        check_device(cudaMemsetAsync(pages_[group].data(), 0, pages_[group].size(), executor.stream),
                     "keys and values");
    }
}

Context::~Context() {
    cudaSetDevice(executor_.device);
    forget_recorded();
}

void Context::forget_recorded() {
    for (auto& [key, recorded] : recorded_)
        if (recorded.graph) cudaGraphExecDestroy(recorded.graph);
    recorded_.clear();
}

// ---- Pages

std::byte* Context::part(int layer, int page, size_t& n_bytes) {
    const auto n_layers = static_cast<int>(executor_.weights.layers.size());
    check<std::invalid_argument>(layer >= 0 && layer < n_layers, "layer ", layer, " is outside 0 … ", n_layers - 1);
    const Layer& l = executor_.weights.layers[layer];
    const int group = l.window ? Windowed : Global;
    check<std::invalid_argument>(page >= 0 && page < n_pages_[group], "page ", page, " is outside 0 … ",
                                 n_pages_[group] - 1);
    n_bytes = l.n_kv_heads * kv_head_layout(type_, l.head_dim).n_bytes;
    return pages_[group].data() + page * layout_.page_bytes[group] + layout_.offsets[layer];
}

void Context::copy_page(int group, int from, int to) {
    check<std::invalid_argument>((group == Global || group == Windowed) && from >= 0 && from < n_pages_[group] &&
                                     to >= 0 && to < n_pages_[group],
                                 "there is no page ", from, " or ", to, " in group ", group);
    const size_t size = layout_.page_bytes[group];
    check_device(cudaMemcpyAsync(pages_[group].data() + to * size, pages_[group].data() + from * size, size,
                                 cudaMemcpyDeviceToDevice, executor_.stream),
                 "copying a page");
}

void Context::read_page(int layer, int page, void* to) {
    size_t n_bytes;
    const std::byte* from = part(layer, page, n_bytes);
    check_device(cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToHost, executor_.stream), "reading a page");
    check_device(cudaStreamSynchronize(executor_.stream), "reading a page");
}

void Context::write_page(int layer, int page, const void* from) {
    size_t n_bytes;
    std::byte* to = part(layer, page, n_bytes);
    check_device(cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyHostToDevice, executor_.stream), "writing a page");
    check_device(cudaStreamSynchronize(executor_.stream), "writing a page");
}

// ---- Logits

void Context::logits(int first, int n, float* to) {
    check<std::invalid_argument>(first >= 0 && n >= 0 && n <= n_outputs_ - first, "rows ", first, " to ", first + n,
                                 " of ", n_outputs_, " are asked for");
    const size_t row = executor_.facts.n_vocab;
    check_device(cudaMemcpyAsync(to, logits_.as<float>() + first * row, n * row * sizeof(float), cudaMemcpyDeviceToHost,
                                 executor_.stream),
                 "reading logits");
    check_device(cudaStreamSynchronize(executor_.stream), "reading logits");
}

int Context::select(int row, int k, const GemmartAdjustments& a, int32_t* ids, float* best, double* logsumexp) {
    Executor& e = executor_;
    const int n_vocab = e.facts.n_vocab;
    check<std::invalid_argument>(row >= 0 && row < n_outputs_, "output ", row, " is outside [0, ", n_outputs_, ")");
    check<std::invalid_argument>(k >= 1, "k is ", k, ", expected at least 1");
    k = std::min(k, n_vocab);
    for (const auto& [list, n] : {std::pair(a.bias_ids, a.n_bias), std::pair(a.recent, a.n_recent)})
        for (int i = 0; i < n; ++i)
            check<std::invalid_argument>(list[i] >= 0 && list[i] < n_vocab, "token id ", list[i], " is outside [0, ",
                                         n_vocab, ")");
    // What goes to the device and what comes back, one behind the other.
    const int n_mask = a.mask ? (n_vocab + 31) / 32 : 0;
    const size_t in_bytes = (2 * a.n_bias + a.n_recent + n_mask) * sizeof(int32_t);
    const size_t out = (in_bytes + 255) / 256 * 256;  // logsumexp, n_found, ids, logits
    const size_t out_bytes = 16 + k * (sizeof(int32_t) + sizeof(float));
    const size_t scratch = out + (out_bytes + 255) / 256 * 256;
    selected_.grow(scratch + select_scratch_bytes(n_vocab, k), "selecting");
    e.staging.grow(std::max(in_bytes, out_bytes), "selecting");
    auto* in = e.staging.as<int32_t>();
    in = std::copy_n(a.bias_ids, a.n_bias, in);
    std::memcpy(in, a.bias, a.n_bias * sizeof(float));
    in = std::copy_n(a.recent, a.n_recent, in + a.n_bias);
    std::copy_n(a.mask, n_mask, in);
    if (in_bytes)
        check_device(cudaMemcpyAsync(selected_.data(), e.staging.data(), in_bytes, cudaMemcpyHostToDevice, e.stream),
                     "selecting");
    const auto* at = selected_.as<int32_t>();
    auto* found = selected_.as<int32_t>(out + 16);
    const SelectJob job{logits_.as<float>() + static_cast<size_t>(row) * n_vocab,
                        n_vocab,
                        k,
                        a.n_bias,
                        a.n_recent,
                        at,
                        at + 2 * a.n_bias,
                        reinterpret_cast<const float*>(at + a.n_bias),
                        a.repeat_penalty,
                        a.presence_penalty,
                        a.frequency_penalty,
                        a.mask ? at + 2 * a.n_bias + a.n_recent : nullptr,
                        found,
                        reinterpret_cast<float*>(found + k),
                        selected_.as<double>(out),
                        selected_.as<int32_t>(out + 8)};
    gpu::select(job, selected_.data() + scratch, e.stream);
    check_device(cudaMemcpyAsync(e.staging.data(), selected_.data() + out, out_bytes, cudaMemcpyDeviceToHost, e.stream),
                 "selecting");
    check_device(cudaStreamSynchronize(e.stream), "selecting");
    const int n_found = *e.staging.as<int32_t>(8);
    check<std::invalid_argument>(n_found > 0, "the mask allows no token");
    *logsumexp = *e.staging.as<double>();
    std::copy_n(e.staging.as<int32_t>(16), n_found, ids);
    std::copy_n(e.staging.as<float>(16 + k * sizeof(int32_t)), n_found, best);
    return n_found;
}

}  // namespace gemmart::gpu
