// The decoder on the CPU.
#pragma once

#include <functional>
#include <memory>

#include "cpu/input_squares.h"
#include "cpu/kernels.h"
#include "cpu/phases.h"
#include "cpu/threads.h"
#include "cpu/weights.h"
#include "decoder.h"
#include "gguf.h"
#include "model_tensors.h"

namespace gemmart::cpu {

class CpuExecutor {
  public:
    // The layers of `config` and `tensors` are those that run here, and the head (the last norm and the output matrix)
    // does where tensors.output is not null. n_batch: most tokens of a forward(). precise: activations in two 8-bit
    // terms for every product of integer weights: twice the work of these products, nearly the result of unrounded
    // activations. Throws OutOfMemory, FileChanged, Cancelled, DeviceError (GEMMART_ISA).
    CpuExecutor(std::shared_ptr<const GgufFile> file, const Config& config, const ModelTensors& tensors, int n_threads,
                int n_batch, bool precise, const WeightOptions& options, Loading& loading);
    ~CpuExecutor();
    // Computes the batch, whose positions are reserved in `cache`, and writes logits [n_outputs, n_vocab], soft-capped
    // and unnormalised, and states [n_hidden, dim]. rest: computes the layers that run elsewhere, which change the
    // residual stream x [n_tokens, dim]; empty where there are none. Where the head is elsewhere, too, nothing is
    // written.
    using Rest = std::function<void(float* x)>;
    void forward(const Batch& batch, const KvCache& cache, float* logits, float* hidden, const Rest& rest);
    const Kernels& kernels() const;
    PhaseTimer& phases();
    // Of the products of all layers, not of the output matrix. On, a pass that wants no row computes all rows of the
    // last layer.
    InputSquares& input_squares();

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

// Bytes that the executor takes for weights, packed or mapped, and for its buffers.
size_t packed_weight_bytes(const ModelTensors& tensors);
size_t mapped_weight_bytes(const GgufFile& file, const ModelTensors& tensors, int n_threads);
size_t buffer_bytes(const Config& config, int n_batch, int n_threads);

}  // namespace gemmart::cpu
