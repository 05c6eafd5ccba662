// A GPU module, opened, and the layers of a model that run in it. The rules of the border: executor_abi.h.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "decoder.h"
#include "executor_abi.h"
#include "gguf.h"
#include "kv_cache.h"
#include "loading.h"
#include "model_tensors.h"
#include "select.h"

namespace gemmart {

class GpuModule {
  public:
    // Opens the shared library. Throws DeviceError where it is none, or is of another version of the border.
    explicit GpuModule(const std::string& path);
    ~GpuModule();
    GpuModule(const GpuModule&) = delete;

    const std::string& path() const { return path_; }
    GemmartBuild build() const;
    std::vector<GemmartDevice> devices() const;  // throws DeviceError

    // Its functions, by the names of executor_abi.h without their prefix.
    struct Functions {
        decltype(&gemmart_abi_version) abi_version;
        decltype(&gemmart_build) build;
        decltype(&gemmart_last_error) last_error;
        decltype(&gemmart_count_devices) count_devices;
        decltype(&gemmart_device) device;
        decltype(&gemmart_plan) plan;
        decltype(&gemmart_load) load;
        decltype(&gemmart_free) free;
        decltype(&gemmart_new_context) new_context;
        decltype(&gemmart_free_context) free_context;
        decltype(&gemmart_copy_page) copy_page;
        decltype(&gemmart_read_page) read_page;
        decltype(&gemmart_write_page) write_page;
        decltype(&gemmart_forward) forward;
        decltype(&gemmart_logits) logits;
        decltype(&gemmart_select) select;
    };
    const Functions& functions() const { return functions_; }
    // Throws what a status stands for; a reader's own error goes before.
    void check_status(int32_t status, const std::string& what) const;

  private:
    const std::string path_;
    void* library_;
    Functions functions_;
};

// Where a run of a model's layers is to run.
struct GpuPart {
    std::shared_ptr<GpuModule> module;
    int device;
    int first_layer, n_layers;
    bool head;      // the last norm and the output matrix too
    bool own_gemm;  // GemmartRange
};

// Bytes of the device's memory. kv: page counts of the cache.
GemmartNeed gpu_need(const GpuModule& module, const Config& config, const ModelTensors& tensors, int first_layer,
                     int n_layers, bool head, int n_batch, const GemmartKv& kv);
GemmartKv gpu_kv(const KvCache& cache);

// The weights of a part on its device. One call of its contexts at a time.
class GpuExecutor {
  public:
    // Throws OutOfMemory, DeviceError, UnsupportedError, FileChanged, Cancelled.
    GpuExecutor(const GpuPart& part, const GgufFile& file, const Config& config, const ModelTensors& tensors,
                int n_batch, bool precise, Loading& loading);
    GpuExecutor(const GpuExecutor&) = delete;
    const GpuPart& part() const { return part_; }

  private:
    friend class GpuContext;
    const GpuPart part_;
    std::unique_ptr<GemmartExecutor, decltype(&gemmart_free)> executor_;
    std::mutex mutex_;
};

// Keys, values and logits of a context's sequences in a part.
class GpuContext final : public PageStore {
  public:
    explicit GpuContext(std::shared_ptr<GpuExecutor> executor) : executor_(std::move(executor)) {}
    ~GpuContext() override;
    const GpuPart& part() const { return executor_->part_; }
    // The cache, whose layers of this part have it for a store, is made. Throws OutOfMemory, DeviceError.
    void allocate(const KvCache& cache);

    // executor_abi.h's. Throw OutOfMemory, DeviceError.
    void forward(const Batch& batch, const KvCache& cache, float* x, float* hidden, uint8_t* finite);
    void logits(int row, float* to);
    Candidates select(int row, int k, const Adjustments& adjust);

    void copy(Group group, int32_t from, int32_t to) override;
    void read(int layer, int32_t page, std::byte* to) override;
    void write(int layer, int32_t page, const std::byte* from) override;

  private:
    template <typename Call>
    void call(const char* what, Call call);

    std::shared_ptr<GpuExecutor> executor_;
    GemmartContext* context_ = nullptr;
};

}  // namespace gemmart
