#include "gpu_module.h"

#include <dlfcn.h>

#include <exception>

#include "error.h"

namespace gemmart {
namespace {

GemmartTensor matrix(const Tensor& tensor) {
    return {static_cast<uint32_t>(tensor.dtype), static_cast<int32_t>(tensor.shape[0]),
            static_cast<int32_t>(tensor.shape[1]), tensor.offset};
}

// A GemmartRange with all that it points to. file: null where the numbers of vectors are not wanted.
class PartRange {
  public:
    PartRange(const GgufFile* file, const Config& config, const ModelTensors& tensors, int first_layer, int n_layers,
              bool head, int n_batch, bool precise, bool own_gemm) {
        const auto vector = [&](const Tensor* tensor) -> const float* {
            if (!tensor) return nullptr;
            vectors_.push_back(file ? load_vector(*file, *tensor) : std::vector<float>(tensor->shape[0]));
            return vectors_.back().data();
        };
        for (int i = first_layer; i < first_layer + n_layers; ++i) {
            const LayerFacts& l = config.layers[i];
            const LayerTensors& t = tensors.layers[i];
            layers_.push_back({l.n_heads,
                               l.n_kv_heads,
                               l.head_dim,
                               l.ffn_dim,
                               l.window,
                               l.rope,
                               l.query_scale,
                               matrix(*t.wq),
                               matrix(*t.wk),
                               matrix(*t.wv),
                               matrix(*t.wo),
                               matrix(*t.gate),
                               matrix(*t.up),
                               matrix(*t.down),
                               vector(t.attn_norm),
                               vector(t.ffn_norm),
                               vector(t.post_attn_norm),
                               vector(t.post_ffn_norm),
                               vector(t.q_norm),
                               vector(t.k_norm)});
        }
        for (const RopeFacts& rope : config.ropes)
            ropes_.push_back({rope.neox, static_cast<int32_t>(rope.inv_freq.size()), rope.inv_freq.data()});
        range_ = {config.dim,
                  config.n_vocab,
                  n_batch,
                  config.norm_eps,
                  config.attention_softcap,
                  config.final_softcap,
                  config.activation == Activation::Silu,
                  precise,
                  n_layers,
                  layers_.data(),
                  static_cast<int32_t>(ropes_.size()),
                  ropes_.data(),
                  head ? vector(tensors.output_norm) : nullptr,
                  head ? matrix(*tensors.output) : GemmartTensor{},
                  own_gemm};
        if (head) range_.output.n_rows = config.n_vocab;  // without padding
    }
    const GemmartRange* get() const { return &range_; }

  private:
    std::vector<GemmartLayer> layers_;
    std::vector<GemmartRope> ropes_;
    std::vector<std::vector<float>> vectors_;  // whose buffers stay where they are as it grows
    GemmartRange range_;
};

// Reads the file for a module, which cannot let an exception pass.
struct Reading {
    const GgufFile& file;
    Loading& loading;
    std::mutex mutex;
    std::exception_ptr error;

    static int32_t read(void* user, uint64_t offset, void* to, uint64_t n_bytes) noexcept {
        auto& self = *static_cast<Reading*>(user);
        try {
            check<Cancelled>(!self.loading.cancelled, "the load was cancelled");
            self.file.bytes().read(offset, to, n_bytes);
            self.loading.done += n_bytes;
            return 0;
        } catch (...) {
            std::lock_guard lock(self.mutex);
            self.error = std::current_exception();
            return 1;
        }
    }
};

}  // namespace

GpuModule::GpuModule(const std::string& path) : path_(path), library_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    check<DeviceError>(library_, "the GPU module cannot be opened: ", library_ ? "" : dlerror());
    try {
        const auto find = [&]<typename F>(F& function, const char* name) {
            function = reinterpret_cast<F>(dlsym(library_, name));
            check<DeviceError>(function, path, " is no GPU module of gemmart: it has no ", name, "()");
        };
        find(functions_.abi_version, "gemmart_abi_version");
        const int32_t version = functions_.abi_version();
        check<DeviceError>(version == GEMMART_ABI_VERSION, path,
                           " was built for another gemmart: its border has version ", version, ", expected ",
                           int{GEMMART_ABI_VERSION}, "; build it anew with --recompile");
        find(functions_.build, "gemmart_build");
        find(functions_.last_error, "gemmart_last_error");
        find(functions_.count_devices, "gemmart_count_devices");
        find(functions_.device, "gemmart_device");
        find(functions_.plan, "gemmart_plan");
        find(functions_.load, "gemmart_load");
        find(functions_.free, "gemmart_free");
        find(functions_.new_context, "gemmart_new_context");
        find(functions_.free_context, "gemmart_free_context");
        find(functions_.copy_page, "gemmart_copy_page");
        find(functions_.read_page, "gemmart_read_page");
        find(functions_.write_page, "gemmart_write_page");
        find(functions_.forward, "gemmart_forward");
        find(functions_.logits, "gemmart_logits");
        find(functions_.select, "gemmart_select");
    } catch (...) {
        dlclose(library_);
        throw;
    }
}

GpuModule::~GpuModule() { dlclose(library_); }

GemmartBuild GpuModule::build() const {
    GemmartBuild build{};
    functions_.build(&build);
    return build;
}

std::vector<GemmartDevice> GpuModule::devices() const {
    int32_t n = 0;
    check_status(functions_.count_devices(&n), "looking for GPUs");
    std::vector<GemmartDevice> found(n);
    for (int32_t i = 0; i < n; ++i) check_status(functions_.device(i, &found[i]), message("asking GPU ", i));
    return found;
}

void GpuModule::check_status(int32_t status, const std::string& what) const {
    if (status == GEMMART_OK) return;
    const std::string text = message(what, ": ", functions_.last_error());
    switch (status) {
        case GEMMART_OUT_OF_MEMORY:
            throw OutOfMemory(text);
        case GEMMART_CANCELLED:
            throw Cancelled(text);
        case GEMMART_UNSUPPORTED:
            throw UnsupportedError(text);
        case GEMMART_INVALID:
            throw std::invalid_argument(text);
        default:
            throw DeviceError(text);
    }
}

GemmartNeed gpu_need(const GpuModule& module, const Config& config, const ModelTensors& tensors, int first_layer,
                     int n_layers, bool head, int n_batch, const GemmartKv& kv) {
    const PartRange range(nullptr, config, tensors, first_layer, n_layers, head, n_batch, false, false);
    GemmartNeed need{};
    module.check_status(module.functions().plan(range.get(), &kv, &need), "planning the GPU's memory");
    return need;
}

GemmartKv gpu_kv(const KvCache& cache) {
    const KvCache::Stats stats = cache.stats();
    return {static_cast<int32_t>(cache.type()), {stats.n_pages[Global], stats.n_pages[Windowed]}};
}

GpuExecutor::GpuExecutor(const GpuPart& part, const GgufFile& file, const Config& config, const ModelTensors& tensors,
                         int n_batch, bool precise, Loading& loading)
    : part_(part), executor_(nullptr, part.module->functions().free) {
    const PartRange range(&file, config, tensors, part.first_layer, part.n_layers, part.head, n_batch, precise,
                          part.own_gemm);
    size_t n_bytes = part.head ? tensors.output->n_bytes : 0;
    for (int i = part.first_layer; i < part.first_layer + part.n_layers; ++i) {
        const LayerTensors& t = tensors.layers[i];
        for (const Tensor* w : {t.wq, t.wk, t.wv, t.wo, t.gate, t.up, t.down}) n_bytes += w->n_bytes;
    }
    loading.total += n_bytes;
    Reading reading{file, loading, {}, nullptr};
    const GemmartReader reader{&Reading::read, &reading};
    GemmartExecutor* loaded = nullptr;
    const int32_t status = part.module->functions().load(part.device, range.get(), &reader, &loaded);
    executor_.reset(loaded);
    if (reading.error) std::rethrow_exception(reading.error);
    part.module->check_status(status, message("loading onto GPU ", part.device));
    file.bytes().check_unchanged();
}

GpuContext::~GpuContext() {
    std::lock_guard lock(executor_->mutex_);
    if (context_) part().module->functions().free_context(context_);
}

template <typename Call>
void GpuContext::call(const char* what, Call call) {
    std::lock_guard lock(executor_->mutex_);
    part().module->check_status(call(part().module->functions()), message(what, " on GPU ", part().device));
}

void GpuContext::allocate(const KvCache& cache) {
    const GemmartKv kv = gpu_kv(cache);
    call("making room for keys and values",
         [&](auto& module) { return module.new_context(executor_->executor_.get(), &kv, &context_); });
}

void GpuContext::forward(const Batch& batch, const KvCache& cache, float* x, float* hidden, uint8_t* finite) {
    std::vector<GemmartSegment> segments;
    for (const Batch::Segment& s : batch.segments) {
        const std::span<const int32_t> global = cache.pages(s.seq, Global), windowed = cache.pages(s.seq, Windowed);
        segments.push_back({s.start,
                            s.n_tokens,
                            {global.data(), windowed.data()},
                            {static_cast<int32_t>(global.size()), static_cast<int32_t>(windowed.size())}});
    }
    const GemmartBatch table{static_cast<int32_t>(segments.size()),      segments.data(),
                             static_cast<int32_t>(batch.outputs.size()), batch.outputs.data(),
                             static_cast<int32_t>(batch.hidden.size()),  batch.hidden.data()};
    call("computing", [&](auto& module) { return module.forward(context_, &table, x, hidden, finite); });
}

void GpuContext::logits(int row, float* to) {
    call("reading logits", [&](auto& module) { return module.logits(context_, row, 1, to); });
}

Candidates GpuContext::select(int row, int k, const Adjustments& adjust) {
    const GemmartAdjustments a{static_cast<int32_t>(adjust.bias_ids.size()),
                               adjust.bias_ids.data(),
                               adjust.bias.data(),
                               static_cast<int32_t>(adjust.recent.size()),
                               adjust.recent.data(),
                               adjust.repeat_penalty,
                               adjust.presence_penalty,
                               adjust.frequency_penalty,
                               adjust.mask.empty() ? nullptr : adjust.mask.data()};
    Candidates best{std::vector<int32_t>(k), std::vector<float>(k), 0};
    int32_t n_found = 0;
    call("selecting", [&](auto& module) {
        return module.select(context_, row, k, &a, best.ids.data(), best.logits.data(), &best.logsumexp, &n_found);
    });
    best.ids.resize(n_found), best.logits.resize(n_found);
    return best;
}

void GpuContext::copy(Group group, int32_t from, int32_t to) {
    call("copying a page", [&](auto& module) { return module.copy_page(context_, group, from, to); });
}

void GpuContext::read(int layer, int32_t page, std::byte* to) {
    call("reading a page",
         [&](auto& module) { return module.read_page(context_, layer - part().first_layer, page, to); });
}

void GpuContext::write(int layer, int32_t page, const std::byte* from) {
    call("writing a page",
         [&](auto& module) { return module.write_page(context_, layer - part().first_layer, page, from); });
}

}  // namespace gemmart
