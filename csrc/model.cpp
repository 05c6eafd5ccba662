#include "model.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "models/models.h"

namespace gemmart {
namespace {

std::vector<KvLayer> kv_layers(const Config& config) {
    std::vector<KvLayer> layers;
    for (const LayerFacts& l : config.layers) layers.push_back({l.n_kv_heads, l.head_dim, l.window});
    return layers;
}

// What is left to the CPU.
Config cpu_config(const ModelFacts& facts, GpuShare gpu) {
    Config config = facts.config;
    config.layers.resize(config.layers.size() - gpu.n_layers);
    return config;
}
ModelTensors cpu_tensors(const ModelFacts& facts, GpuShare gpu) {
    ModelTensors tensors = facts.tensors;
    tensors.layers.resize(tensors.layers.size() - gpu.n_layers);
    if (gpu.head) tensors.output = nullptr;
    return tensors;
}

GpuShare share_of(const ModelFacts& facts, const std::vector<GpuPart>& parts) {
    GpuShare share;
    const auto n_layers = static_cast<int>(facts.config.layers.size());
    for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
        check<std::invalid_argument>(
            part->n_layers > 0 && part->first_layer + part->n_layers == n_layers - share.n_layers &&
                part->first_layer >= 0 && (!part->head || part == parts.rbegin()),
            "GPU parts must be runs of the last layers, one behind the other, the head in the last one");
        share.n_layers += part->n_layers;
        share.head = share.head || part->head;
    }
    return share;
}

}  // namespace

ModelFacts::ModelFacts(std::vector<Range> ranges)
    : file(std::make_shared<GgufFile>(std::move(ranges))),
      config(read_config(*file)),
      tensors(find_tensors(*file, config)) {}

MemoryNeed memory_need(const ModelFacts& facts, int n_threads, int n_batch, int64_t n_kv_tokens, int n_sequences,
                       KvType kv_type, GpuShare gpu) {
    const Config config = cpu_config(facts, gpu);
    const ModelTensors tensors = cpu_tensors(facts, gpu);
    size_t kv = 0;
    if (!config.layers.empty()) {
        const KvCache::Stats stats =
            KvCache(kv_layers(config), kv_type, n_kv_tokens, n_sequences, Context::kSlack).stats();
        for (int group : {Global, Windowed}) kv += stats.n_pages[group] * stats.page_bytes[group];
    }
    return {cpu::packed_weight_bytes(tensors), cpu::mapped_weight_bytes(*facts.file, tensors, n_threads),
            cpu::buffer_bytes(config, n_batch, n_threads), kv};
}

GemmartNeed gpu_need(const ModelFacts& facts, const GpuModule& module, int first_layer, int n_layers, bool head,
                     int n_batch, int64_t n_kv_tokens, int n_sequences, KvType kv_type) {
    const KvCache cache(kv_layers(facts.config), kv_type, n_kv_tokens, n_sequences, Context::kSlack);
    return gpu_need(module, facts.config, facts.tensors, first_layer, n_layers, head, n_batch, gpu_kv(cache));
}

Model::Model(ModelFacts facts, int n_threads, int n_batch, bool precise, const cpu::WeightOptions& options,
             const std::vector<GpuPart>& gpu, Loading& loading)
    : facts_(std::move(facts)),
      n_batch_(n_batch),
      gpu_([&] {
          std::vector<std::shared_ptr<GpuExecutor>> executors;
          share_of(facts_, gpu);
          for (const GpuPart& part : gpu)
              executors.push_back(std::make_shared<GpuExecutor>(part, *facts_.file, facts_.config, facts_.tensors,
                                                                n_batch, precise, loading));
          return executors;
      }()),
      executor_(facts_.file, cpu_config(facts_, share_of(facts_, gpu)), cpu_tensors(facts_, share_of(facts_, gpu)),
                n_threads, n_batch, precise, options, loading) {}

void Model::time_phases(bool on) {
    std::lock_guard lock(mutex_);
    executor_.phases().set(on);
}

std::vector<cpu::PhaseTime> Model::phase_times() {
    std::lock_guard lock(mutex_);
    return executor_.phases().times();
}

void Model::sum_input_squares(bool on) {
    check<std::invalid_argument>(gpu_.empty(), "input squares are summed on the CPU only");
    std::lock_guard lock(mutex_);
    executor_.input_squares().set(on);
}

std::vector<cpu::InputSquares::Sums> Model::input_squares() {
    std::lock_guard lock(mutex_);
    return executor_.input_squares().all();
}

Context::Context(std::shared_ptr<Model> model, int64_t n_kv_tokens, int n_sequences, KvType kv_type)
    : model_(std::move(model)),
      gpu_([&] {
          std::vector<std::unique_ptr<GpuContext>> contexts;
          for (const auto& executor : model_->gpu_) contexts.push_back(std::make_unique<GpuContext>(executor));
          return contexts;
      }()),
      kv_(kv_layers(), kv_type, n_kv_tokens, n_sequences, kSlack) {
    for (const auto& context : gpu_) context->allocate(kv_);
}

std::vector<KvLayer> Context::kv_layers() const {
    std::vector<KvLayer> layers = gemmart::kv_layers(model_->facts().config);
    for (const auto& context : gpu_)
        for (int i = 0; i < context->part().n_layers; ++i)
            layers[context->part().first_layer + i].store = context.get();
    return layers;
}

std::vector<bool> Context::forward(std::span<const int32_t> tokens, std::span<const Run> runs,
                                   std::span<const int> outputs, std::span<const int> hidden) {
    const int n = static_cast<int>(tokens.size());
    check<std::invalid_argument>(n >= 1 && n <= model_->n_batch(), "a batch has ", n, " tokens, expected 1 to ",
                                 model_->n_batch());
    for (int i = 0; i < n; ++i)
        check<std::invalid_argument>(tokens[i] >= 0 && tokens[i] < n_vocab(), "token id ", tokens[i], " at row ", i,
                                     " is outside [0, ", n_vocab(), ")");
    int total = 0;
    Batch batch;
    std::vector<int> seqs, counts;
    for (const Run& run : runs) {
        check<std::invalid_argument>(run.n_tokens >= 1 && run.n_tokens <= n - total,
                                     "the runs of a batch have more or less than its ", n, " tokens");
        check<std::invalid_argument>(std::find(seqs.begin(), seqs.end(), run.seq) == seqs.end(), "sequence ", run.seq,
                                     " stands twice in a batch");
        batch.segments.push_back({run.seq, kv_.length(run.seq), run.n_tokens});
        seqs.push_back(run.seq), counts.push_back(run.n_tokens);
        total += run.n_tokens;
    }
    check<std::invalid_argument>(total == n, "the runs of a batch have ", total, " tokens, the batch ", n);
    for (std::span<const int> rows : {outputs, hidden})
        for (size_t i = 0; i < rows.size(); ++i)
            check<std::invalid_argument>(rows[i] >= (i ? rows[i - 1] + 1 : 0) && rows[i] < n, "output row ", rows[i],
                                         ": rows must ascend within the batch's ", n);
    for (int row : hidden)
        check<std::invalid_argument>(!std::binary_search(outputs.begin(), outputs.end(), row), "row ", row,
                                     " is to have logits and a state; a row has one of them");
    check<OutOfMemory>(kv_.can_hold(seqs, counts), "the KV cache has no room for ", n, " more tokens");
    batch.tokens.assign(tokens.begin(), tokens.end());
    batch.outputs.assign(outputs.begin(), outputs.end());
    batch.hidden.assign(hidden.begin(), hidden.end());

    std::lock_guard lock(model_->mutex_);
    n_outputs_ = 0, n_hidden_ = 0;
    const size_t n_rows = head_on_gpu() ? 1 : outputs.size();
    if (const size_t n = n_rows * n_vocab(); n > logits_.size()) {
        logits_ = {};  // nothing is copied, and no room is left for more
        logits_.resize(n);
    }
    hidden_.resize(std::max(hidden_.size(), hidden.size() * dim()));
    for (const Run& run : runs) kv_.reserve(run.seq, run.n_tokens);
    std::vector<uint8_t> gpu_finite(outputs.size() + hidden.size());
    cpu::CpuExecutor::Rest rest;
    if (!gpu_.empty())
        rest = [&](float* x) {
            for (const auto& context : gpu_) context->forward(batch, kv_, x, hidden_.data(), gpu_finite.data());
        };
    model_->executor_.forward(batch, kv_, logits_.data(), hidden_.data(), rest);
    size_t row = 0;
    for (const Run& run : runs) {
        kv_.commit(run.seq, tokens.subspan(row, run.n_tokens));
        row += run.n_tokens;
    }
    n_outputs_ = static_cast<int>(outputs.size()), n_hidden_ = hidden.size();
    if (head_on_gpu()) return {gpu_finite.begin(), gpu_finite.end()};
    std::vector<bool> finite;
    for (int i = 0; i < n_outputs_; ++i) finite.push_back(model_->kernels().all_finite(logits(i), n_vocab()));
    for (size_t i = 0; i < n_hidden_; ++i)
        finite.push_back(model_->kernels().all_finite(hidden_.data() + i * dim(), dim()));
    return finite;
}

void Context::check_output(int output) const {
    check<std::invalid_argument>(output >= 0 && output < n_outputs_, "output ", output, " is outside [0, ", n_outputs_,
                                 ")");
}

const float* Context::logits(int output) {
    check_output(output);
    if (head_on_gpu()) {
        gpu_.back()->logits(output, logits_.data());
        return logits_.data();
    }
    return logits_.data() + static_cast<size_t>(output) * n_vocab();
}

Candidates Context::select(int output, int k, const Adjustments& adjust) {
    check_output(output);
    if (head_on_gpu()) return gpu_.back()->select(output, k, adjust);
    float* row = logits_.data() + static_cast<size_t>(output) * n_vocab();
    return gemmart::select({row, static_cast<size_t>(n_vocab())}, k, adjust, model_->kernels());
}

}  // namespace gemmart
