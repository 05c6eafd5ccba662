// The weights of a range: where they stand, and how they come there.
#include <algorithm>

#include "cuda/executor.cuh"

namespace gemmart::gpu {
namespace {

constexpr size_t kAlign = 256;
constexpr size_t kPiece = 16 << 20;  // bytes that are read, copied and packed at a time
constexpr int kPanelRows = 32;       // pack_rows() begins at a multiple

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

size_t raw_row(const Matrix& w) { return row_bytes(format_of(w.dtype), w.n_cols); }

int rows_a_piece(const Matrix& w) {
    return static_cast<int>(std::max<size_t>(kPiece / (raw_row(w) * kPanelRows), 1)) * kPanelRows;
}

}  // namespace

Weights::Weights(const GemmartRange& range) : layers(range.n_layers), inv_freq(range.n_ropes) {
    const auto vector = [&](const float* from, int n, const float*& to) {
        to = nullptr;
        if (from) add(from, n * sizeof(float), reinterpret_cast<const void**>(&to));
    };
    for (int i = 0; i < range.n_layers; ++i) {
        const GemmartLayer& from = range.layers[i];
        Layer& l = layers[i];
        l.n_heads = from.n_heads, l.n_kv_heads = from.n_kv_heads, l.head_dim = from.head_dim;
        l.ffn_dim = from.ffn_dim, l.window = from.window, l.rope = from.rope, l.query_scale = from.query_scale;
        add(from.wq, l.wq), add(from.wk, l.wk), add(from.wv, l.wv), add(from.wo, l.wo);
        add(from.gate, l.gate), add(from.up, l.up), add(from.down, l.down);
        vector(from.attn_norm, range.dim, l.attn_norm), vector(from.ffn_norm, range.dim, l.ffn_norm);
        vector(from.post_attn_norm, range.dim, l.post_attn_norm),
            vector(from.post_ffn_norm, range.dim, l.post_ffn_norm);
        vector(from.q_norm, l.head_dim, l.q_norm), vector(from.k_norm, l.head_dim, l.k_norm);
    }
    for (int i = 0; i < range.n_ropes; ++i)
        add(range.ropes[i].inv_freq, range.ropes[i].half * sizeof(double),
            reinterpret_cast<const void**>(&inv_freq[i]));
    vector(range.output_norm, range.dim, output_norm);
    if (range.output_norm) add(range.output, output);
}

void Weights::add(const GemmartTensor& tensor, Matrix& to) {
    to = {static_cast<DType>(tensor.dtype), tensor.n_rows, tensor.n_cols, nullptr};
    pieces_.push_back({tensor, &to, n_bytes_});
    n_bytes_ += round_up(matrix_bytes(to.dtype, to.n_rows, to.n_cols), kAlign);
}

void Weights::add(const void* from, size_t n_bytes, const void** to) {
    numbers_.push_back({from, n_bytes, n_bytes_, to});
    n_bytes_ += round_up(n_bytes, kAlign);
}

void Weights::load(const GemmartReader& reader, cudaStream_t stream) {
    memory_ = DeviceMemory(n_bytes_, "weights");
    for (const auto& [from, n_bytes, offset, to] : numbers_) {
        check_device(cudaMemcpyAsync(memory_.data() + offset, from, n_bytes, cudaMemcpyHostToDevice, stream),
                     "vectors");
        *to = memory_.data() + offset;
    }
    size_t largest = 0;
    for (const Piece& piece : pieces_)
        largest = std::max(largest, raw_row(*piece.to) * std::min(rows_a_piece(*piece.to), piece.to->n_rows));
    // While one piece is copied and packed the next one is read.
    struct Stage {
        PinnedMemory host;
        DeviceMemory raw;
        cudaEvent_t done = nullptr;
        ~Stage() {
            if (done) cudaEventDestroy(done);
        }
    };
    Stage stages[2];
    for (Stage& stage : stages) {
        stage.host = PinnedMemory(largest, "loading");
        stage.raw = DeviceMemory(largest, "loading");
        check_device(cudaEventCreateWithFlags(&stage.done, cudaEventDisableTiming), "an event");
    }
    const struct Wait {  // before the stages go, also where loading ends early
        cudaStream_t stream;
        ~Wait() { cudaStreamSynchronize(stream); }
    } wait{stream};
    int n_read = 0;
    for (const auto& [tensor, to, offset] : pieces_) {
        to->data = memory_.data() + offset;
        const size_t row = raw_row(*to);
        const int step = rows_a_piece(*to);
        for (int first = 0; first < to->n_rows; first += step) {
            const int n_rows = std::min(step, to->n_rows - first);
            Stage& stage = stages[n_read++ % 2];
            check_device(cudaEventSynchronize(stage.done), "loading");
            check<Cancelled>(
                reader.read(reader.user, tensor.offset + first * row, stage.host.data(), n_rows * row) == 0,
                "the load was cancelled");
            check_device(
                cudaMemcpyAsync(stage.raw.data(), stage.host.data(), n_rows * row, cudaMemcpyHostToDevice, stream),
                "loading");
            pack_rows(*to, stage.raw.data(), first, n_rows, stream);
            check_device(cudaEventRecord(stage.done, stream), "loading");
        }
    }
    check_device(cudaStreamSynchronize(stream), "loading");
    pieces_.clear(), numbers_.clear();
}

}  // namespace gemmart::gpu
