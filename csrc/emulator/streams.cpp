#include <algorithm>
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "emulator/state.h"

using namespace gemmart::emulator;

namespace {

using Work = std::function<cudaError_t()>;

std::recursive_mutex mutex;  // of all that follows

// What waits to be done. Streams that are not cudaStreamNonBlocking share that of the default stream, since the one
// waits for the others.
struct Queue {
    std::deque<Work> waiting;
    uint64_t n_added = 0, n_done = 0;

    cudaError_t do_one() {
        const Work work = std::move(waiting.front());
        waiting.pop_front();
        const cudaError_t error = work();
        n_done++;
        return error;
    }
    cudaError_t do_until(uint64_t n) {
        cudaError_t first = cudaSuccess;
        while (n_done < n) {
            const cudaError_t error = do_one();
            if (first == cudaSuccess) first = error;
        }
        return first;
    }
};

std::shared_ptr<Queue> default_queue() {
    static const auto queue = std::make_shared<Queue>();
    return queue;
}
std::vector<std::weak_ptr<Queue>>& all_queues() {
    static std::vector<std::weak_ptr<Queue>> queues{default_queue()};
    return queues;
}

thread_local int n_capturing = 0;

}  // namespace

struct EmulatedGraph {
    std::vector<Work> works;
};
struct EmulatedStream {
    std::shared_ptr<Queue> queue = default_queue();
    EmulatedGraph* capturing = nullptr;
};
struct EmulatedEvent {
    std::chrono::steady_clock::time_point at;
    std::shared_ptr<Queue> queue;  // where it was recorded last, as which of its works
    uint64_t number = 0;
};

namespace {

EmulatedStream& stream_of(cudaStream_t stream) {
    static EmulatedStream default_stream;
    return stream ? *stream : default_stream;
}
cudaError_t wait_for(EmulatedEvent& event) { return event.queue ? event.queue->do_until(event.number) : cudaSuccess; }
// A device at work for a moment, while somebody asks whether it is ready.
cudaError_t ask(Queue& queue, uint64_t n) {
    if (queue.n_done >= n) return cudaSuccess;
    const cudaError_t error = queue.do_one();
    return error == cudaSuccess ? cudaErrorNotReady : error;
}

cudaError_t copy(void* to, const void* from, size_t width, size_t height, size_t to_pitch, size_t from_pitch) {
    for (size_t i = 0; i < height && width; i++) {
        memmove(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
    }
    return cudaSuccess;
}

}  // namespace

namespace gemmart::emulator {

bool is_capturing() { return n_capturing > 0; }

void run_all_streams() {
    const std::lock_guard lock(mutex);
    std::erase_if(all_queues(), [](const auto& queue) { return queue.expired(); });
    for (size_t i = 0; i < all_queues().size(); i++) {
        if (const auto queue = all_queues()[i].lock()) keep(queue->do_until(queue->n_added));
    }
}

cudaError_t submit(cudaStream_t stream, Work work) {
    const std::lock_guard lock(mutex);
    EmulatedStream& to = stream_of(stream);
    if (to.capturing) {
        to.capturing->works.push_back(std::move(work));
        return cudaSuccess;
    }
    to.queue->waiting.push_back(std::move(work));
    to.queue->n_added++;
    if (setting("GEMMART_EMULATED_STREAMS", "") == "late") return cudaSuccess;
    return keep(to.queue->do_until(to.queue->n_added));
}

cudaError_t submit_kernel(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                          std::function<void()> kernel) {
    const uint64_t n_threads = uint64_t{block.x} * block.y * block.z;
    const uint64_t n_blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (n_threads == 0 || n_threads > 1024 || n_blocks == 0 || grid.y > 65535 || grid.z > 65535) {
        return keep(cudaErrorInvalidConfiguration);
    }
    if (shared_bytes > kMostShared) return keep(cudaErrorInvalidValue);
    return submit(stream, [=, kernel = std::move(kernel)] {
        std::string reason = run_grid(grid, block, shared_bytes, kernel);
        if (reason.empty()) return cudaSuccess;
        set_failure(std::move(reason));
        return cudaErrorLaunchFailure;
    });
}

}  // namespace gemmart::emulator

// ---- copies

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
    // Between two places of the device it is not waited for.
    return error == cudaSuccess && !(is_device(to) && is_device(from)) ? cudaStreamSynchronize(nullptr) : error;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
    const bool from_pageable = !is_device(from) && !is_pinned(from), to_pageable = !is_device(to) && !is_pinned(to);
    if (from_pageable && !stream_of(stream).capturing && width) {  // read before the call returns
        auto bytes = std::make_shared<std::vector<char>>(width * height);
        copy(bytes->data(), from, width, height, width, from_pitch);
        return submit(stream, [=] { return copy(to, bytes->data(), width, height, to_pitch, width); });
    }
    const cudaError_t error = submit(stream, [=] { return copy(to, from, width, height, to_pitch, from_pitch); });
    if (error != cudaSuccess || !to_pageable || stream_of(stream).capturing) return error;
    return cudaStreamSynchronize(stream);  // written before the call returns
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    return submit(stream, [=] {
        if (bytes) memset(to, value, bytes);
        return cudaSuccess;
    });
}

// ---- streams

cudaError_t cudaStreamCreate(cudaStream_t* made) { return cudaStreamCreateWithFlags(made, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned flags) {
    *made = nullptr;
    if (const cudaError_t error = find_device(device_now()); error != cudaSuccess) return keep(error);
    const std::lock_guard lock(mutex);
    *made = new EmulatedStream;
    if (flags & cudaStreamNonBlocking) {
        (*made)->queue = std::make_shared<Queue>();
        all_queues().push_back((*made)->queue);
    }
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const cudaError_t error = cudaStreamSynchronize(stream);
    delete stream;
    return error;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const std::lock_guard lock(mutex);
    const EmulatedStream& of = stream_of(stream);
    if (of.capturing) return keep(cudaErrorStreamCaptureUnsupported);
    return keep(of.queue->do_until(of.queue->n_added));
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    const std::lock_guard lock(mutex);
    Queue& queue = *stream_of(stream).queue;
    return ask(queue, queue.n_added);
}
cudaError_t cudaDeviceSynchronize() {
    if (is_capturing()) return keep(cudaErrorStreamCaptureUnsupported);
    const cudaError_t before = cudaGetLastError();
    run_all_streams();
    const cudaError_t found = cudaPeekAtLastError();
    if (found == cudaSuccess) keep(before);
    return found;
}

// ---- events

cudaError_t cudaEventCreate(cudaEvent_t* made) { return cudaEventCreateWithFlags(made, 0); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned) {
    *made = new EmulatedEvent;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    const std::lock_guard lock(mutex);
    if (event) wait_for(*event);  // its stream still writes to it
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const std::lock_guard lock(mutex);
    EmulatedStream& on = stream_of(stream);
    if (on.capturing) return keep(cudaErrorStreamCaptureUnsupported);
    event->queue = on.queue;
    event->number = on.queue->n_added + 1;
    return submit(stream, [=] {
        event->at = std::chrono::steady_clock::now();
        return cudaSuccess;
    });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const std::lock_guard lock(mutex);
    return keep(wait_for(*event));
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    const std::lock_guard lock(mutex);
    return event->queue ? ask(*event->queue, event->number) : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    const std::lock_guard lock(mutex);
    if (stream_of(stream).capturing) return keep(cudaErrorStreamCaptureUnsupported);
    return submit(stream, [queue = event->queue, number = event->number] {
        return queue ? queue->do_until(number) : cudaSuccess;
    });
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
    return cudaSuccess;
}

// ---- graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (!stream || stream->capturing) return keep(cudaErrorStreamCaptureUnsupported);
    stream->capturing = new EmulatedGraph;
    n_capturing++;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* made) {
    *made = nullptr;
    if (!stream || !stream->capturing) return keep(cudaErrorInvalidValue);
    *made = stream->capturing;
    stream->capturing = nullptr;
    n_capturing--;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
    *made = new EmulatedGraph(*graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    for (const Work& work : graph->works) {
        if (const cudaError_t error = submit(stream, work); error != cudaSuccess) return error;
    }
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaGraphDestroy(graph); }
