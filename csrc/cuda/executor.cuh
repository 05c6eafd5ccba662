// A range of layers on a device: their weights, the buffers of a pass, and contexts with keys, values and logits.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <vector>

#include "cuda/kernels.cuh"
#include "cuda/memory.cuh"
#include "executor_abi.h"

namespace gemmart::gpu {

struct Layer {
    int n_heads, n_kv_heads, head_dim, ffn_dim, window, rope;
    float query_scale;
    Matrix wq, wk, wv, wo, gate, up, down;
    const float *attn_norm, *ffn_norm, *post_attn_norm, *post_ffn_norm, *q_norm, *k_norm;
};

// Throws UnsupportedError where the kernels do not run such a range.
void check_range(const GemmartRange& range);

// Where weights stand in one piece of memory: sizes without numbers first, then with them.
class Weights {
  public:
    explicit Weights(const GemmartRange& range);  // sizes only
    size_t n_bytes() const { return n_bytes_; }
    // Reads them all onto the present device. Throws Cancelled, OutOfMemory, DeviceError.
    void load(const GemmartReader& reader, cudaStream_t stream);

    std::vector<Layer> layers;
    std::vector<const double*> inv_freq;  // of each rope
    const float* output_norm = nullptr;
    Matrix output{};

  private:
    struct Piece {
        GemmartTensor tensor;
        Matrix* to;
        size_t offset;
    };
    struct Numbers {
        const void* from;
        size_t n_bytes, offset;
        const void** to;
    };
    void add(const GemmartTensor& tensor, Matrix& to);
    void add(const void* from, size_t n_bytes, const void** to);

    size_t n_bytes_ = 0;
    std::vector<Piece> pieces_;
    std::vector<Numbers> numbers_;  // vectors
    DeviceMemory memory_;
};

// All that a pass writes but attention's scratch.
struct Buffers {
    float *x, *proj;         // [n_batch, dim]: the residual stream; what is added to it
    float *q, *k, *v;        // [n_batch, n_heads or n_kv_heads, head_dim]
    float* attended;         // [n_batch, n_heads, head_dim]
    float *gate, *up;        // [n_batch, ffn_dim]
    std::byte* rows;         // what the next products are multiplied with
    float *cosines, *sines;  // [n_ropes, n_batch, half]
    std::byte* scratch;      // of products
    size_t n_bytes = 0;

    Buffers(const GemmartRange& range, const Weights& weights, std::byte* memory);  // null: sizes only
};

class Executor {
  public:
    Executor(int device, const GemmartRange& range, const GemmartReader& reader);
    ~Executor();
    Executor(const Executor&) = delete;
    int widest_half() const { return *std::max_element(rope_halves.begin(), rope_halves.end()); }

    const int device;
    const GemmartRange facts;  // without what it points to
    const Activation activation;
    std::vector<int> rope_halves;
    std::vector<bool> rope_neox;
    Weights weights;
    cudaStream_t stream = nullptr;
    DeviceMemory buffer_memory;
    Buffers buffers;
    DeviceMemory attention_scratch, table_memory;
    PinnedMemory tables, staging;
    int n_moves = 0;  // how often memory that a recorded pass knows has moved
};

// Where the parts of layers stand in the pages of their groups.
struct PageLayout {
    std::vector<size_t> offsets;  // of each layer
    std::array<size_t, 2> page_bytes{};
};
PageLayout page_layout(const std::vector<Layer>& layers, KvType type);

class Context {
  public:
    Context(Executor& executor, const GemmartKv& kv);
    ~Context();
    Context(const Context&) = delete;

    void copy_page(int group, int from, int to);
    void read_page(int layer, int page, void* to);
    void write_page(int layer, int page, const void* from);
    void forward(const GemmartBatch& batch, float* x, float* hidden, uint8_t* finite);
    void logits(int first, int n, float* to);
    int select(int row, int k, const GemmartAdjustments& adjust, int32_t* ids, float* best, double* logsumexp);
    Executor& executor() { return executor_; }

  private:
    struct Pass;
    struct Recorded {
        int n_seen = 0;
        cudaGraphExec_t graph = nullptr;
    };
    std::byte* part(int layer, int page, size_t& n_bytes);
    void upload_tables(Pass& pass);
    void copy_rows(const Pass& pass, float* x, bool to_device);
    Rows rows(int n, int n_few, int n_cols, bool two_terms) const;
    void run(const Pass& pass);
    void run_layer(const Pass& pass, int index);
    void run_head(const Pass& pass);
    void run_recorded(const Pass& pass);
    cudaGraphExec_t record(const Pass& pass);
    void forget_recorded();

    Executor& executor_;
    const KvType type_;
    std::array<int64_t, 2> n_pages_;
    const PageLayout layout_;
    std::array<DeviceMemory, 2> pages_;
    DeviceMemory logits_, finite_, selected_;
    int n_outputs_ = 0;
    std::map<std::vector<int>, Recorded> recorded_;
    int n_moves_ = 0;
    bool records_ = true;
};

}  // namespace gemmart::gpu
