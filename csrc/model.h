// Model: an opened file, its configuration and its executors. Context: the sequences that run on it.
#pragma once

#include <memory>
#include <mutex>
#include <span>

#include "cpu/executor.h"
#include "decoder.h"
#include "gguf.h"
#include "gpu_module.h"
#include "kv_cache.h"
#include "model_tensors.h"
#include "select.h"

namespace gemmart {

// What a file announces, read from its metadata and tensor table alone.
struct ModelFacts {
    std::shared_ptr<const GgufFile> file;
    Config config;
    ModelTensors tensors;

    explicit ModelFacts(std::vector<Range> ranges);  // as GgufFile takes them
};

// How many of the last layers run on GPUs, and whether the head does.
struct GpuShare {
    int n_layers = 0;
    bool head = false;
};

// Bytes of this machine's memory that a model and a context will take, without what lies on GPUs.
struct MemoryNeed {
    size_t packed_weights;
    size_t mapped_weights;  // besides the system's cache of the file
    size_t buffers;
    size_t kv;  // when every page is in use
};
MemoryNeed memory_need(const ModelFacts& facts, int n_threads, int n_batch, int64_t n_kv_tokens, int n_sequences,
                       KvType kv_type, GpuShare gpu);
// Bytes of a GPU's memory that layers [first_layer, first_layer + n_layers), and the head, will take.
GemmartNeed gpu_need(const ModelFacts& facts, const GpuModule& module, int first_layer, int n_layers, bool head,
                     int n_batch, int64_t n_kv_tokens, int n_sequences, KvType kv_type);

class Model {
  public:
    // gpu: parts of the last layers, in order; the head only in the last one. The layers before them run on the CPU,
    // and so does the head where none of them has it.
    Model(ModelFacts facts, int n_threads, int n_batch, bool precise, const cpu::WeightOptions& options,
          const std::vector<GpuPart>& gpu, Loading& loading);
    const ModelFacts& facts() const { return facts_; }
    const cpu::Kernels& kernels() const { return executor_.kernels(); }
    int n_batch() const { return n_batch_; }

    // Measures from now on, anew, where the time of each forward goes; or no more.
    void time_phases(bool on);
    std::vector<cpu::PhaseTime> phase_times();
    // The same of the squares of what the layers' matrices are multiplied with. Throws std::invalid_argument where some
    // run on a GPU.
    void sum_input_squares(bool on);
    std::vector<cpu::InputSquares::Sums> input_squares();

  private:
    friend class Context;
    const ModelFacts facts_;
    const int n_batch_;
    std::vector<std::shared_ptr<GpuExecutor>> gpu_;
    cpu::CpuExecutor executor_;
    std::mutex mutex_;  // the executors' buffers serve one forward at a time
};

class Context {
  public:
    // Tokens that a sequence can be trimmed back and still have all that its windowed layers see.
    static constexpr int kSlack = 64;

    Context(std::shared_ptr<Model> model, int64_t n_kv_tokens, int n_sequences, KvType kv_type);

    struct Run {
        int seq;
        int n_tokens;
    };
    // Appends tokens to sequences, run by run, and computes the logits of the rows `outputs` and the states behind the
    // last norm of the rows `hidden` (both ascending, no row in both). Returns whether each of these rows is finite,
    // those of `outputs` first. Throws std::invalid_argument or OutOfMemory with nothing changed.
    std::vector<bool> forward(std::span<const int32_t> tokens, std::span<const Run> runs, std::span<const int> outputs,
                              std::span<const int> hidden);

    // Logits of the last forward: n_outputs() rows of n_vocab().
    int n_outputs() const { return n_outputs_; }
    int n_vocab() const { return model_->facts().config.n_vocab; }
    const float* logits(int output);
    // States of the last forward, [n_hidden, dim].
    std::span<const float> hidden() const { return {hidden_.data(), n_hidden_ * dim()}; }
    int dim() const { return model_->facts().config.dim; }
    // The k best of a row of them after bias and penalties, which are not seen in the row itself. Throws
    // std::invalid_argument.
    Candidates select(int output, int k, const Adjustments& adjust);

    KvCache& kv() { return kv_; }

  private:
    std::vector<KvLayer> kv_layers() const;
    void check_output(int output) const;
    bool head_on_gpu() const { return !gpu_.empty() && gpu_.back()->part().head; }

    std::shared_ptr<Model> model_;
    std::vector<std::unique_ptr<GpuContext>> gpu_;  // of each part
    KvCache kv_;
    std::vector<float> logits_;  // head on a GPU: one row, the last that was read
    std::vector<float> hidden_;
    int n_outputs_ = 0;
    size_t n_hidden_ = 0;
};

}  // namespace gemmart
