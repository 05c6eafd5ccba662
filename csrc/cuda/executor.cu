#include "cuda/executor.cuh"

#include <algorithm>

#include "error.h"

namespace gemmart::gpu {
namespace {

struct Widest {
    int q = 0, kv = 0, ffn = 0, cols = 0, half = 0;

    explicit Widest(const GemmartRange& range) : cols(range.dim) {
        for (int i = 0; i < range.n_layers; ++i) {
            const GemmartLayer& l = range.layers[i];
            q = std::max(q, l.n_heads * l.head_dim), kv = std::max(kv, l.n_kv_heads * l.head_dim);
            ffn = std::max(ffn, l.ffn_dim);
        }
        for (int i = 0; i < range.n_ropes; ++i) half = std::max(half, range.ropes[i].half);
        cols = std::max({cols, q, ffn});
    }
};

template <typename Visit>
void each_matrix(const Weights& weights, Visit visit) {
    for (const Layer& l : weights.layers)
        for (const Matrix* w : {&l.wq, &l.wk, &l.wv, &l.wo, &l.gate, &l.up, &l.down}) visit(*w);
    if (weights.output.n_rows) visit(weights.output);
}

// Stands alone, without the caller's pointers.
GemmartRange without_pointers(GemmartRange range) {
    range.layers = nullptr, range.ropes = nullptr, range.output_norm = nullptr;
    return range;
}

}  // namespace

void check_range(const GemmartRange& range) {
    const auto check_matrix = [](const char* name, const GemmartTensor& t) {
        check<UnsupportedError>(find_format(t.dtype), name, " has the unknown format ", t.dtype);
        check<UnsupportedError>(t.n_cols % kGroup == 0, name, " has ", t.n_cols,
                                " columns, the GPU's kernels need a multiple of ", kGroup);
    };
    for (int i = 0; i < range.n_layers; ++i) {
        const GemmartLayer& l = range.layers[i];
        check<UnsupportedError>(l.head_dim % 8 == 0 && l.head_dim <= 256, "head_dim is ", l.head_dim,
                                ", the GPU's kernels need a multiple of 8, at most 256");
        check_matrix("wq", l.wq), check_matrix("wk", l.wk), check_matrix("wv", l.wv), check_matrix("wo", l.wo);
        check_matrix("gate", l.gate), check_matrix("up", l.up), check_matrix("down", l.down);
    }
    if (range.output_norm) check_matrix("output", range.output);
}

Buffers::Buffers(const GemmartRange& range, const Weights& weights, std::byte* memory) {
    const auto take = [&](size_t size) {
        std::byte* at = memory ? memory + n_bytes : nullptr;
        n_bytes += (size + 255) / 256 * 256;
        return at;
    };
    const Widest widest(range);
    const size_t n = range.n_batch;
    const auto floats = [&](size_t count) { return reinterpret_cast<float*>(take(count * sizeof(float))); };
    x = floats(n * range.dim), proj = floats(n * range.dim);
    q = floats(n * widest.q), k = floats(n * widest.kv), v = floats(n * widest.kv), attended = floats(n * widest.q);
    gate = floats(n * widest.ffn), up = floats(n * widest.ffn);
    rows = take(rows_bytes(range.n_batch, widest.cols));
    cosines = floats(range.n_ropes * n * widest.half), sines = floats(range.n_ropes * n * widest.half);
    size_t scratch_bytes = 0;
    each_matrix(weights, [&](const Matrix& w) {
        scratch_bytes = std::max(scratch_bytes, multiply_scratch_bytes(w, range.n_batch));
    });
    scratch = take(scratch_bytes);
}

Executor::Executor(int device_, const GemmartRange& range, const GemmartReader& reader)
    : device(device_),
      facts(without_pointers(range)),
      activation(range.silu ? Activation::Silu : Activation::Gelu),
      weights(range),
      buffers(range, weights, nullptr) {
    for (int i = 0; i < range.n_ropes; ++i)
        rope_halves.push_back(range.ropes[i].half), rope_neox.push_back(range.ropes[i].neox);
    check_device(cudaSetDevice(device), "choosing the device");
    buffer_memory = DeviceMemory(buffers.n_bytes, "buffers");
    buffers = Buffers(range, weights, buffer_memory.data());
    check_device(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    try {
        weights.load(reader, stream);
    } catch (...) {
        cudaStreamDestroy(stream);
        throw;
    }
}

Executor::~Executor() {
    cudaSetDevice(device);
    cudaStreamDestroy(stream);
}

PageLayout page_layout(const std::vector<Layer>& layers, KvType type) {
    check<std::invalid_argument>(type >= KvType::F32 && type <= KvType::Q8_0, "the KV type ", static_cast<int>(type),
                                 " is unknown");
    PageLayout layout;
    for (const Layer& l : layers) {
        size_t& page = layout.page_bytes[l.window ? Windowed : Global];
        layout.offsets.push_back(page);
        page += l.n_kv_heads * kv_head_layout(type, l.head_dim).n_bytes;
    }
    return layout;
}

}  // namespace gemmart::gpu
