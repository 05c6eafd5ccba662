// The functions of executor_abi.h.
#include <cstring>

#include "cuda/executor.cuh"
#include "cuda/status.cuh"
#include "executor_abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)
#if GEMMART_CUDA
#define BACKEND "cuda"
#define COMPILER "nvcc " TEXT_OF(__CUDACC_VER_MAJOR__) "." TEXT_OF(__CUDACC_VER_MINOR__)
#elif GEMMART_HIP
#define BACKEND "hip"
#define COMPILER "clang " __clang_version__
#else
#define BACKEND "emulated"
#define COMPILER "C++ " __VERSION__
#endif
// What only the build knows.
#ifndef GEMMART_VERSION
#define GEMMART_VERSION "unknown"
#endif
#ifndef GEMMART_ARCHS
#define GEMMART_ARCHS BACKEND
#endif

using namespace gemmart;
using namespace gemmart::gpu;

struct GemmartExecutor {
    Executor executor;
};
struct GemmartContext {
    Context context;
};

namespace {

__global__ void probe() { wait_for_previous(); }

void on_device(const Executor& executor) { check_device(cudaSetDevice(executor.device), "choosing the device"); }

template <size_t n>
void copy_text(char (&to)[n], const std::string& from) {
    std::strncpy(to, from.c_str(), n - 1);
    to[n - 1] = 0;
}

}  // namespace

EXPORT int32_t gemmart_abi_version() { return GEMMART_ABI_VERSION; }

EXPORT void gemmart_build(GemmartBuild* build) {
    *build = {BACKEND, GEMMART_VERSION, COMPILER, GEMMART_ARCHS, gemm_name()};
}

EXPORT const char* gemmart_last_error() { return last_error().c_str(); }

EXPORT int32_t gemmart_count_devices(int32_t* n) {
    return guarded([&] {
        int found = 0;
        const cudaError_t error = cudaGetDeviceCount(&found);
        if (error != cudaErrorNoDevice) check_device(error, "looking for devices");
        *n = error == cudaErrorNoDevice ? 0 : found;
    });
}

EXPORT int32_t gemmart_device(int32_t device, GemmartDevice* found) {
    return guarded([&] {
        *found = {};
        cudaDeviceProp properties;
        check_device(cudaGetDeviceProperties(&properties, device), "asking for its properties");
        copy_text(found->name, properties.name);
        copy_text(found->arch, device_arch(properties));
        found->n_units = properties.multiProcessorCount;
        found->total_bytes = properties.totalGlobalMem;
        try {
            check_device(cudaSetDevice(device), "choosing it");
            size_t n_free = 0, total = 0;
            check_device(cudaMemGetInfo(&n_free, &total), "asking for its memory");
            found->free_bytes = n_free, found->total_bytes = total;
            launch(probe, dim3(1), dim3(32), 0, nullptr);
            check_device(cudaStreamSynchronize(nullptr), "starting a kernel");
            found->usable = 1;
        } catch (const Error& error) {
            copy_text(found->problem, error.what());
        }
    });
}

EXPORT int32_t gemmart_plan(const GemmartRange* range, const GemmartKv* kv, GemmartNeed* need) {
    return guarded([&] {
        check_range(*range);
        const Weights weights(*range);
        const auto bytes = page_layout(weights.layers, static_cast<KvType>(kv->type)).page_bytes;
        *need = {weights.n_bytes(), Buffers(*range, weights, nullptr).n_bytes,
                 kv->n_pages[0] * bytes[0] + kv->n_pages[1] * bytes[1]};
    });
}

EXPORT int32_t gemmart_load(int32_t device, const GemmartRange* range, const GemmartReader* reader,
                            GemmartExecutor** loaded) {
    return guarded([&] {
        check_range(*range);
        *loaded = new GemmartExecutor{{device, *range, *reader}};
    });
}

EXPORT void gemmart_free(GemmartExecutor* executor) { delete executor; }

EXPORT int32_t gemmart_new_context(GemmartExecutor* executor, const GemmartKv* kv, GemmartContext** made) {
    return guarded([&] { *made = new GemmartContext{{executor->executor, *kv}}; });
}

EXPORT void gemmart_free_context(GemmartContext* context) { delete context; }

EXPORT int32_t gemmart_copy_page(GemmartContext* context, int32_t group, int32_t from, int32_t to) {
    return guarded([&] {
        on_device(context->context.executor());
        context->context.copy_page(group, from, to);
    });
}

EXPORT int32_t gemmart_read_page(GemmartContext* context, int32_t layer, int32_t page, void* to) {
    return guarded([&] {
        on_device(context->context.executor());
        context->context.read_page(layer, page, to);
    });
}

EXPORT int32_t gemmart_write_page(GemmartContext* context, int32_t layer, int32_t page, const void* from) {
    return guarded([&] {
        on_device(context->context.executor());
        context->context.write_page(layer, page, from);
    });
}

EXPORT int32_t gemmart_forward(GemmartContext* context, const GemmartBatch* batch, float* x, float* hidden,
                               uint8_t* finite) {
    return guarded([&] {
        on_device(context->context.executor());
        context->context.forward(*batch, x, hidden, finite);
    });
}

EXPORT int32_t gemmart_logits(GemmartContext* context, int32_t first, int32_t n, float* to) {
    return guarded([&] {
        on_device(context->context.executor());
        context->context.logits(first, n, to);
    });
}

EXPORT int32_t gemmart_select(GemmartContext* context, int32_t row, int32_t k, const GemmartAdjustments* adjustments,
                              int32_t* ids, float* logits, double* logsumexp, int32_t* n_found) {
    return guarded([&] {
        on_device(context->context.executor());
        *n_found = context->context.select(row, k, *adjustments, ids, logits, logsumexp);
    });
}
