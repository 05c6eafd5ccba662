// Kernels that use every shim of cuda/device.cuh, called by test_gpu_shims.py under the emulator and compiled for all.
#include <algorithm>

#include "cuda/kernel_tests.cuh"
#include "cuda/status.cuh"
#include "formats/all.h"

namespace gemmart::gpu {
namespace {

// What each lane gets: [6, 32]
__global__ void lanes_kernel(const float* x, float* out) {
    wait_for_previous();
    const float v = x[threadIdx.x];
    float* to = out + group() * 6 * kLanes + lane();
    to[0 * kLanes] = shuffle(v, 5);
    to[1 * kLanes] = shuffle_xor(v, 3);
    to[2 * kLanes] = shuffle_down(v, 7);
    to[3 * kLanes] = sum_lanes(v);
    to[4 * kLanes] = max_lanes(v);
    to[5 * kLanes] = static_cast<float>(sum_lanes(static_cast<double>(v)));
    let_next_start();
}

// c [kTileM, kTileN] += a [16, 16] · b, where b is [kTileN, 16], or [16, kTileN] if transposed; `n_waves` times over.
template <typename T>
__global__ __launch_bounds__(128) void tiles_kernel(const float* a, const float* b, int transposed, float* c) {
    constexpr int kLd = kTileK + 8;
    __shared__ __align__(16) T shared_a[kTileM * kLd];
    __shared__ __align__(16) T shared_b[kTileK * kLd];
    wait_for_previous();
    const int threads = static_cast<int>(blockDim.x), me = static_cast<int>(threadIdx.x);
    const int columns = transposed ? kTileN : kTileK;
    for (int i = me; i < kTileM * kTileK; i += threads) shared_a[i / kTileK * kLd + i % kTileK] = round_to<T>(a[i]);
    for (int i = me; i < kTileN * kTileK; i += threads) shared_b[i / columns * kLd + i % columns] = round_to<T>(b[i]);
    __syncthreads();
    TileA<T> tile_a;
    TileB<T> tile_b;
    TileC tile_c;
    float* to = c + me / kTileLanes * kTileM * kTileN;
    for (int i = 0; i < kTileElements; i++) tile_c.x[i] = to[tile_row(i) * kTileN + tile_col(i)];
    load_a(tile_a, shared_a, kLd);
    if (transposed) {
        load_b_transposed(tile_b, shared_b, kLd);
    } else {
        load_b(tile_b, shared_b, kLd);
    }
    multiply(tile_c, tile_a, tile_b);
    for (int i = 0; i < kTileElements; i++) to[tile_row(i) * kTileN + tile_col(i)] = tile_c.x[i];
}

// out <- x, by way of shared memory, `n` times 16 bytes a thread, two of them on their way.
__global__ void copies_kernel(const uint4* x, uint4* out, int n, int forget_to_wait) {
    wait_for_previous();
    SHARED_MEMORY(memory);
    uint4* stages = reinterpret_cast<uint4*>(memory);  // [2, threads]
    const int threads = static_cast<int>(blockDim.x), me = static_cast<int>(threadIdx.x);
    copy_async16(&stages[me], &x[me]);
    commit_copies();
    for (int i = 0; i < n; i++) {
        if (i + 1 < n) copy_async16(&stages[(i + 1) % 2 * threads + me], &x[(i + 1) * threads + me]);
        commit_copies();
        if (!forget_to_wait) wait_copies<1>();
        __syncthreads();
        out[i * threads + threads - 1 - me] = stages[i % 2 * threads + threads - 1 - me];
        __syncthreads();
    }
}

// Reverses x [threads] in shared memory; without the barrier, in whatever order threads happen to run.
__global__ void reverse_kernel(const float* x, float* out, int forget_barrier) {
    wait_for_previous();
    __shared__ float shared[256];
    const int me = static_cast<int>(threadIdx.x), last = static_cast<int>(blockDim.x) - 1;
    shared[me] = -1;
    __syncthreads();
    shared[me] = x[me];
    if (!forget_barrier) __syncthreads();
    out[me] = shared[last - me];
}

enum Wrong {
    kHalfAtBarrier,
    kHalfShuffles,
    kDifferentMeetings,
    kNoWait,
    kNothing,
    kBehind,
    kNull,
    kMisaligned,
    kIndex
};
__global__ void wrong_kernel(int wrong, float* out) {
    if (wrong != kNoWait) wait_for_previous();
    const int me = static_cast<int>(threadIdx.x);
    float v = static_cast<float>(me);
    if (wrong == kHalfAtBarrier && me < 32) __syncthreads();
    if (wrong == kHalfShuffles && me < 16) v = shuffle(v, 0);
    if (wrong == kDifferentMeetings) {
        if (me < 16) {
            v = shuffle(v, 0);
        } else {
            __syncthreads();
        }
    }
    if (wrong == kBehind) out[me + 256] = v;
    if (wrong == kNull && me == 63) *static_cast<volatile float*>(nullptr) = v;
    if (wrong == kMisaligned) *reinterpret_cast<float2*>(out + 1) = make_float2(v, v);
    out[me] = v;
    if (wrong == kIndex) {
        __shared__ float few[4];
        few[me] = v;
        out[me] = few[me];
    }
}

__global__ void numbers_kernel(const float* x, int n, float* out, const int* a, int* dots) {
    wait_for_previous();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
        out[0 * n + i] = to_float(round_to<__nv_bfloat16>(x[i]));
        out[1 * n + i] = to_float(round_to<__half>(x[i]));
        const float2 bf16 = pair_to_floats<__nv_bfloat16>(round_pair<__nv_bfloat16>(x[i], -x[i]));
        const float2 half = pair_to_floats<__half>(round_pair<__half>(x[i], -x[i]));
        out[2 * n + i] = bf16.x == -bf16.y ? bf16.x : NAN;
        out[3 * n + i] = half.x == -half.y ? half.x : NAN;
        out[4 * n + i] = fast_exp(x[i]);
        out[5 * n + i] = fast_tanh(x[i]);
        dots[0 * n + i] = dot4(a[i], a[n - 1 - i], i);
        dots[1 * n + i] = dot4_unsigned_signed(static_cast<unsigned>(a[i]), a[n - 1 - i], i);
    }
}

__global__ void add_one_kernel(float* x) {
    wait_for_previous();
    x[blockIdx.x * blockDim.x + threadIdx.x] += 1;
}

// Formats decode in kernels too.
__global__ void decode_kernel(const BlockQ4_K* blocks, float* out) {
    wait_for_previous();
    decode(blocks[threadIdx.x], out + threadIdx.x * BlockQ4_K::kSize);
}

}  // namespace
}  // namespace gemmart::gpu

using namespace gemmart;
using namespace gemmart::gpu;

#pragma GCC visibility push(default)
extern "C" {

const char* shims_failure() { return last_error().c_str(); }
int shims_tile_n() { return kTileN; }
int shims_tile_lanes() { return kTileLanes; }

int shims_lanes(float* x, int threads, float* out) {
    return guarded([&] {
        const DeviceMemory from = on_device(x, threads), to = on_device(out, 6 * threads);
        launch(lanes_kernel, 1, threads, 0, nullptr, from.as<float>(), to.as<float>());
        to_host(out, to, 6 * threads);
    });
}

int shims_tiles(int half, float* a, float* b, int transposed, float* c, int n_waves) {
    return guarded([&] {
        const int n = n_waves * kTileM * kTileN;
        const DeviceMemory da = on_device(a, kTileM * kTileK), db = on_device(b, kTileK * kTileN), dc = on_device(c, n);
        const auto kernel = half ? tiles_kernel<__half> : tiles_kernel<__nv_bfloat16>;
        launch(kernel, 1, n_waves * kTileLanes, 0, nullptr, da.as<float>(), db.as<float>(), transposed, dc.as<float>());
        to_host(c, dc, n);
    });
}

int shims_copies(uint32_t* x, uint32_t* out, int threads, int n, int forget_to_wait) {
    return guarded([&] {
        const DeviceMemory from = on_device(x, threads * n * 4), to = on_device(out, threads * n * 4);
        launch(copies_kernel, 1, threads, threads * 2 * sizeof(uint4), nullptr, from.as<uint4>(), to.as<uint4>(), n,
               forget_to_wait);
        to_host(out, to, threads * n * 4);
    });
}

int shims_reverse(float* x, float* out, int threads, int forget_barrier) {
    return guarded([&] {
        const DeviceMemory from = on_device(x, threads), to = on_device(out, threads);
        launch(reverse_kernel, 1, threads, 0, nullptr, from.as<float>(), to.as<float>(), forget_barrier);
        to_host(out, to, threads);
    });
}

int shims_wrong(int wrong, float* out, int threads, size_t shared_bytes) {
    return guarded([&] {
        const DeviceMemory to = on_device(out, threads);
        launch(wrong_kernel, 1, threads, shared_bytes, nullptr, wrong, to.as<float>());
        to_host(out, to, threads);
    });
}

int shims_numbers(float* x, int n, float* out, int* a, int* dots) {
    return guarded([&] {
        const DeviceMemory dx = on_device(x, n), dout = on_device(out, 6 * n);
        const DeviceMemory da = on_device(a, n), ddots = on_device(dots, 2 * n);
        launch(numbers_kernel, 1, 64, 0, nullptr, dx.as<float>(), n, dout.as<float>(), da.as<int>(), ddots.as<int>());
        to_host(out, dout, 6 * n);
        to_host(dots, ddots, 2 * n);
    });
}

// x [n] += n_launches, captured once.
int shims_graph(float* x, int n, int n_launches) {
    return guarded([&] {
        const DeviceMemory dx = on_device(x, n);
        const TestStream stream;
        cudaGraph_t graph;
        cudaGraphExec_t ready;
        check_device(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "capture");
        launch(add_one_kernel, n / 32, 32, 0, stream.get(), dx.as<float>());
        check_device(cudaStreamEndCapture(stream.get(), &graph), "capture");
        check_device(cudaGraphInstantiate(&ready, graph), "graph");
        check_device(cudaGraphDestroy(graph), "graph");
        for (int i = 0; i < n_launches; i++) check_device(cudaGraphLaunch(ready, stream.get()), "graph");
        stream.wait();
        check_device(cudaGraphExecDestroy(ready), "graph");
        to_host(x, dx, n);
    });
}

// What pinned memory holds after x += 1 on the device was asked for, and after it was waited for.
int shims_streams(float x, float* asked, float* waited) {
    return guarded([&] {
        const PinnedMemory host(32 * sizeof(float), "a test");
        const DeviceMemory device(host.size(), "a test");
        std::fill_n(host.as<float>(), 32, x);
        const TestStream stream;
        check_device(cudaMemcpyAsync(device.data(), host.data(), host.size(), cudaMemcpyHostToDevice, stream.get()),
                     "copy");
        launch(add_one_kernel, 1, 32, 0, stream.get(), device.as<float>());
        check_device(cudaMemcpyAsync(host.data(), device.data(), host.size(), cudaMemcpyDeviceToHost, stream.get()),
                     "copy");
        *asked = host.as<float>()[31];
        stream.wait();
        *waited = host.as<float>()[31];
    });
}

int shims_decode(uint8_t* block, float* out) {
    return guarded([&] {
        const DeviceMemory from = on_device(block, sizeof(BlockQ4_K)), to = on_device(out, 256);
        launch(decode_kernel, 1, 1, 0, nullptr, from.as<BlockQ4_K>(), to.as<float>());
        to_host(out, to, 256);
    });
}

int shims_allocate(size_t bytes, size_t* n_free, size_t* total) {
    return guarded([&] {
        const DeviceMemory memory(bytes, "a test");
        check_device(cudaMemGetInfo(n_free, total), "memory");
    });
}

int shims_device(int device, char* name, int* n, size_t* shared_limit) {
    return guarded([&] {
        check_device(cudaGetDeviceCount(n), "devices");
        cudaDeviceProp found;
        check_device(cudaGetDeviceProperties(&found, device), "device");
        *shared_limit = shared_memory_limit(device);
        device_arch(found).copy(name, 31);
    });
}

}  // extern "C"
#pragma GCC visibility pop
