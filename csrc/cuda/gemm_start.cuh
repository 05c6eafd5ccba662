// Starts gemm_kernel() in the shape that suits the device and the number of rows. The bits do not depend on it.
#pragma once

#include "cuda/gemm_tile.cuh"

namespace gemmart::gpu {

struct GemmRoom {
    int n_units;             // multiprocessors
    size_t shared_of_block;  // most that a block can have
};
GemmRoom gemm_room();  // of the current device

// False where the shape is too large: for the rows, or to occupy every multiprocessor, unless it is the last one; or
// for the shared memory.
template <typename Shape, typename Source, int kTermsX>
bool start_shape(GemmJob job, const Source& source, const GemmRoom& room, bool is_last, cudaStream_t stream) {
    const dim3 grid((job.m + Shape::kM - 1) / Shape::kM, (job.n + Shape::kN - 1) / Shape::kN);
    if (!is_last && (job.m <= Shape::kM / 2 || static_cast<int64_t>(grid.x) * grid.y < room.n_units)) return false;
    const auto bytes = gemm_shared_bytes<Shape, Source, kTermsX>;
    if (bytes(2) > room.shared_of_block) return false;
    // A multiprocessor has 1 KiB more than its largest block, and keeps 1 KiB of each.
    constexpr size_t kKept = 1024;
    job.stages = bytes(4) <= (room.shared_of_block + kKept) / Shape::kBlocks - kKept ? 4 : 2;
    launch(gemm_kernel<Shape, Source, kTermsX>, grid, dim3(kGemmThreads), bytes(job.stages), stream, job, source);
    return true;
}

template <typename Source, int kTermsX>
void start_gemm(const GemmJob& job, const Source& source, cudaStream_t stream) {
    const GemmRoom room = gemm_room();
    start_shape<LargeShape, Source, kTermsX>(job, source, room, false, stream) ||
        start_shape<MiddleShape, Source, kTermsX>(job, source, room, false, stream) ||
        start_shape<SmallShape, Source, kTermsX>(job, source, room, true, stream);
}

}  // namespace gemmart::gpu
