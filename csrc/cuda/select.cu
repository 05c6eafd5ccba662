// The k best of a row of logits: what csrc/select.cpp computes, with the same bits, on the device.
//
// A candidate is a 64-bit key, the logit in an order of integers above the complement of its id, so that the largest
// key is the best one and ties go to the smaller id; 0: may not be chosen. Blocks sort 2048 candidates each and keep
// the k best until one block is left; where k is more than half of that, all are sorted.
#include <algorithm>

#include "cuda/kernels.cuh"
#include "cuda/sort.cuh"

namespace gemmart::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kMostKept = kSorted / 2;  // by a block that sorts
constexpr int kSums = 64;               // blocks that share the sum of all

__device__ uint64_t candidate(float logit, int id) {
    const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 is equal to 0
    const uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000;
    return static_cast<uint64_t>(order) << 32 | ~static_cast<uint32_t>(id);
}
__device__ int id_of(uint64_t candidate) { return static_cast<int>(~static_cast<uint32_t>(candidate)); }

__device__ bool may_be_chosen(const int32_t* mask, int id) { return !mask || (mask[id / 32] >> id % 32 & 1); }

int padded(int n_vocab) {
    int n = kSorted;
    while (n < n_vocab) n *= 2;
    return n;
}

// What select() works in.
struct Room {
    double* sums;                          // [kSums]
    uint64_t* lists[2];                    // [padded(n_vocab)]
    float* row;                            // [n_vocab], adjusted
    int32_t *bias_counts, *recent_counts;  // [n_vocab]
    std::byte* end;

    Room(std::byte* at, int n_vocab) {
        sums = reinterpret_cast<double*>(at);
        lists[0] = reinterpret_cast<uint64_t*>(sums + kSums);
        lists[1] = lists[0] + padded(n_vocab);
        row = reinterpret_cast<float*>(lists[1] + padded(n_vocab));
        bias_counts = reinterpret_cast<int32_t*>(row + n_vocab);
        recent_counts = bias_counts + n_vocab;
        end = reinterpret_cast<std::byte*>(recent_counts + n_vocab);
    }
};

// finite[row] is 1 before.
__global__ void __launch_bounds__(kThreads) cap_kernel(float* logits, int n_cols, float cap, uint8_t* finite) {
    let_next_start();
    wait_for_previous();
    float* row = logits + static_cast<size_t>(blockIdx.y) * n_cols;
    bool is_finite = true;
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < n_cols; i += gridDim.x * kThreads) {
        const float x = row[i];
        is_finite = is_finite && fabsf(x) < INFINITY;
        if (cap != 0) row[i] = cap * tanhf(x / cap);
    }
    if (!is_finite) finite[blockIdx.y] = 0;
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const float* logits, int n_vocab, float* row, int32_t* counts) {
    let_next_start();
    wait_for_previous();
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < n_vocab) row[i] = logits[i], counts[i] = 0, counts[n_vocab + i] = 0;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const int32_t* ids, int n, int32_t* counts) {
    let_next_start();
    wait_for_previous();
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < n) atomicAdd(&counts[ids[i]], 1);
}

// row[ids[i]] += bias[i]; where an id is there more than once, its first thread adds all, in order.
__global__ void __launch_bounds__(kThreads)
    bias_kernel(const int32_t* ids, const float* bias, int n, const int32_t* counts, float* row) {
    let_next_start();
    wait_for_previous();
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < n) {
        const int id = ids[i];
        bool is_first = true;
        if (counts[id] > 1)
            for (int j = 0; j < i; j++) is_first = is_first && ids[j] != id;
        if (is_first) {
            float sum = row[id] + bias[i];
            if (counts[id] > 1)
                for (int j = i + 1; j < n; j++)
                    if (ids[j] == id) sum += bias[j];
            row[id] = sum;
        }
    }
}

// row <- `from`, which may be the same, with penalties where there are counts; candidates [n_candidates], with those
// that there are not as 0.
__global__ void __launch_bounds__(kThreads) candidates_kernel(SelectJob job, const float* from, const int32_t* counts,
                                                              float* row, uint64_t* candidates, int n_candidates) {
    let_next_start();
    wait_for_previous();
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < job.n_vocab) {
        float x = from[i];
        if (counts && counts[i] > 0) {
            x = x > 0 ? x / job.repeat_penalty : x * job.repeat_penalty;
            x -= job.presence_penalty + job.frequency_penalty * static_cast<float>(counts[i]);
        }
        row[i] = x;
        candidates[i] = may_be_chosen(job.mask, i) ? candidate(x, i) : 0;
    } else if (i < n_candidates) {
        candidates[i] = 0;
    }
}

// The best `kept` of each kSorted of from [n]. alternate: every second block the other way round, all of them.
__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const uint64_t* from, int n, int kept, bool alternate, uint64_t* to) {
    __shared__ uint64_t keys[kSorted];
    let_next_start();
    wait_for_previous();
    const int first = blockIdx.x * kSorted;
    for (int i = threadIdx.x; i < kSorted; i += kSortThreads) keys[i] = first + i < n ? from[first + i] : 0;
    sort_block(keys, !alternate || blockIdx.x % 2 == 0);
    for (int i = threadIdx.x; i < kept; i += kSortThreads) to[static_cast<size_t>(blockIdx.x) * kept + i] = keys[i];
}

// One step of a merge of runs of `size` keys.
__global__ void __launch_bounds__(kThreads) step_kernel(uint64_t* keys, int n, int size, int stride) {
    let_next_start();
    wait_for_previous();
    const int pair = blockIdx.x * kThreads + threadIdx.x;
    if (pair < n / 2) {
        const int i = pair / stride * 2 * stride + pair % stride;
        order_pair(keys[i], keys[i + stride], (i & size) == 0);
    }
}

// Its steps inside of kSorted keys.
__global__ void __launch_bounds__(kSortThreads) merge_kernel(uint64_t* all, int size) {
    __shared__ uint64_t keys[kSorted];
    let_next_start();
    wait_for_previous();
    const size_t first = static_cast<size_t>(blockIdx.x) * kSorted;
    for (int i = threadIdx.x; i < kSorted; i += kSortThreads) keys[i] = all[first + i];
    merge_runs(keys, size, (first & size) == 0);
    __syncthreads();
    for (int i = threadIdx.x; i < kSorted; i += kSortThreads) all[first + i] = keys[i];
}

// sums [kSums] <- Σ e^(x - the best)
__global__ void __launch_bounds__(kThreads)
    sum_kernel(SelectJob job, const float* row, const uint64_t* best, double* sums) {
    __shared__ double sum[kThreads];
    let_next_start();
    wait_for_previous();
    double of_thread = 0;
    if (best[0] != 0) {
        const float largest = row[id_of(best[0])];
        for (int i = blockIdx.x * kThreads + threadIdx.x; i < job.n_vocab; i += kSums * kThreads)
            if (may_be_chosen(job.mask, i)) of_thread += expf(row[i] - largest);
    }
    sum[threadIdx.x] = of_thread;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) sum[threadIdx.x] += sum[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = sum[0];
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(SelectJob job, const float* row, const uint64_t* best, const double* sums) {
    let_next_start();
    wait_for_previous();
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < job.k && best[i] != 0) {
        job.ids[i] = id_of(best[i]);
        job.best[i] = row[id_of(best[i])];
        if (i + 1 == job.k || best[i + 1] == 0) *job.n_found = i + 1;
    }
    if (i == 0) {
        double sum = 0;
        for (int j = 0; j < kSums; j++) sum += sums[j];
        *job.logsumexp = best[0] != 0 ? row[id_of(best[0])] + log(sum) : -INFINITY;
        if (best[0] == 0) *job.n_found = 0;
    }
}

dim3 blocks_of(int n) { return {static_cast<unsigned>((n + kThreads - 1) / kThreads)}; }

// The list whose first k are the best, in order. The candidates are in lists[0].
uint64_t* sort_candidates(uint64_t* const (&lists)[2], int n_vocab, int k, cudaStream_t stream) {
    if (k <= kMostKept) {
        int n = n_vocab, list = 0;
        while (true) {
            const int n_blocks = (n + kSorted - 1) / kSorted;
            int kept = 1;
            while (kept < k) kept *= 2;
            launch(sort_kernel, dim3(n_blocks), dim3(kSortThreads), 0, stream, lists[list], n, kept, false,
                   lists[1 - list]);
            list = 1 - list, n = n_blocks * kept;
            if (n_blocks == 1) return lists[list];
        }
    }
    const int n = padded(n_vocab);
    launch(sort_kernel, dim3(n / kSorted), dim3(kSortThreads), 0, stream, lists[0], n, kSorted, true, lists[1]);
    for (int size = 2 * kSorted; size <= n; size *= 2) {
        for (int stride = size / 2; stride >= kSorted; stride /= 2)
            launch(step_kernel, blocks_of(n / 2), dim3(kThreads), 0, stream, lists[1], n, size, stride);
        launch(merge_kernel, dim3(n / kSorted), dim3(kSortThreads), 0, stream, lists[1], size);
    }
    return lists[1];
}

}  // namespace

void cap_logits(float* logits, int n, int n_cols, float cap, uint8_t* finite, cudaStream_t stream) {
    if (n == 0) return;
    constexpr int kColumns = 8;  // of a thread
    check_device(cudaMemsetAsync(finite, 1, n, stream), "logits");
    launch(cap_kernel, dim3((n_cols + kColumns * kThreads - 1) / (kColumns * kThreads), n), dim3(kThreads), 0, stream,
           logits, n_cols, cap, finite);
}

size_t select_scratch_bytes(int n_vocab, int) { return reinterpret_cast<uintptr_t>(Room(nullptr, n_vocab).end); }

void select(const SelectJob& given, std::byte* scratch, cudaStream_t stream) {
    SelectJob job = given;
    job.k = std::min(job.k, job.n_vocab);
    const Room room(scratch, job.n_vocab);
    const bool has_penalties =
        job.n_recent > 0 && (job.repeat_penalty != 1 || job.presence_penalty != 0 || job.frequency_penalty != 0);
    const bool is_adjusted = job.n_bias > 0 || has_penalties;
    if (is_adjusted)
        launch(copy_kernel, blocks_of(job.n_vocab), dim3(kThreads), 0, stream, job.logits, job.n_vocab, room.row,
               room.bias_counts);
    if (job.n_bias > 0) {
        launch(count_kernel, blocks_of(job.n_bias), dim3(kThreads), 0, stream, job.bias_ids, job.n_bias,
               room.bias_counts);
        launch(bias_kernel, blocks_of(job.n_bias), dim3(kThreads), 0, stream, job.bias_ids, job.bias, job.n_bias,
               room.bias_counts, room.row);
    }
    if (has_penalties)
        launch(count_kernel, blocks_of(job.n_recent), dim3(kThreads), 0, stream, job.recent, job.n_recent,
               room.recent_counts);
    const int n = padded(job.n_vocab);
    launch(candidates_kernel, blocks_of(n), dim3(kThreads), 0, stream, job, is_adjusted ? room.row : job.logits,
           has_penalties ? room.recent_counts : nullptr, room.row, room.lists[0], n);
    const uint64_t* best = sort_candidates(room.lists, job.n_vocab, job.k, stream);
    launch(sum_kernel, dim3(kSums), dim3(kThreads), 0, stream, job, room.row, best, room.sums);
    launch(finish_kernel, blocks_of(job.k), dim3(kThreads), 0, stream, job, room.row, best, room.sums);
}

}  // namespace gemmart::gpu
