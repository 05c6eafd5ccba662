// out[m, n] = Σ_k x[m, k] · w[n, k] on tensor cores: one block computes kM × kN of it, in steps of kK columns.
//
// x is bf16 in one or two terms. The weights come from a Source (gemm_sources.cuh): bf16 planes that are copied as they
// are, or a quantised format whose groups of 32 weights are fetched into registers a step ahead and decoded into shared
// memory while other warps multiply. Of two terms each, lo · lo is left out: it is smaller than what lo has lost.
//
// Each element is one chain of tile products in order of k, whatever the shape of the block and the number of rows:
// a row has the same bits alone and in company. Rows and columns beyond the edges repeat the last ones and are not
// stored, so that nothing is read that does not exist.
//
// Rows in shared memory are 8 elements longer than kK: 16-byte pieces of eight rows then lie in different banks.
//
// By arithmetic a step of the large shape takes 512 cycles of an A100's tensor cores and 384 of its shared memory (256
// to read tiles, 64 each to write x and decoded weights). Not measured.
#pragma once

#include "cuda/device.cuh"

namespace gemmart::gpu {

// Four waves, two by two.
inline constexpr int kWavesM = 2, kWavesN = 2, kGemmThreads = kWavesM * kWavesN * kTileLanes;

template <int kM_, int kN_, int kK_, int kBlocks_>
struct GemmShape {
    static constexpr int kM = kM_, kN = kN_, kK = kK_;
    static constexpr int kBlocks = kBlocks_;  // that a multiprocessor should hold
    static constexpr int kLd = kK + 8;
    static constexpr int kWaveM = kM / kWavesM, kWaveN = kN / kWavesN;
    static constexpr int kTilesM = kWaveM / kTileM, kTilesN = kWaveN / kTileN;
};
// With 32 lanes a wave of the large one does 32 tile products for 12 loads, of the others 8 for 6 and 2 for 3: these
// are for few rows, and for matrices that would not occupy the device otherwise.
using LargeShape = GemmShape<128, 128, 32, 2>;
using MiddleShape = GemmShape<64, 64, 64, 4>;
using SmallShape = GemmShape<32, 32, 64, 4>;

// Whether tiles are FMAs on shared memory, which gain nothing by a large shape and want more registers than there are:
// a block then computes its part in small ones. The host does not know, since one module serves several devices.
template <typename A>
inline constexpr bool kIsPlain = requires(A a) { a.shared; };
inline constexpr bool kPlainTiles = kIsPlain<TileA<__nv_bfloat16>>;

struct GemmJob {
    const __nv_bfloat16 *x_hi, *x_lo;  // [m, n_cols]; lo: null for one term
    float* out;                        // [m, ld_out]
    int m, n, n_cols, ld_out;
    int stages;  // 2 or 4: how many steps of what is copied have room
};

template <typename Shape, typename Source, int kTermsX>
constexpr size_t gemm_shared_bytes(int stages) {
    const int w_stages = Source::kCopied ? stages : 2;
    const int elements = stages * kTermsX * Shape::kM * Shape::kLd + w_stages * Source::kTerms * Shape::kN * Shape::kLd;
    return elements * sizeof(__nv_bfloat16);
}

// Rows first … of the kK columns of `step` to shared memory; a row's end need not be a step's.
template <typename Shape, int kRows>
__device__ __forceinline__ void copy_rows(__nv_bfloat16* shared, const __nv_bfloat16* from, int first, int n_rows,
                                          int n_cols, int step) {
    constexpr int kPieces = Shape::kK / 8;
    static_assert(kRows * kPieces % kGemmThreads == 0);
#pragma unroll
    for (int i = 0; i < kRows * kPieces / kGemmThreads; i++) {
        const int piece = i * kGemmThreads + threadIdx.x;
        const int row = piece / kPieces, c = piece % kPieces * 8, col = step * Shape::kK + c;
        if (col < n_cols)
            copy_async16(shared + row * Shape::kLd + c,
                         from + static_cast<size_t>(min(first + row, n_rows - 1)) * n_cols + col);
    }
}

// What a wave adds to its tiles from 16 columns in shared memory.
template <typename Shape, int kTermsX, int kTermsW>
__device__ __forceinline__ void multiply_tiles(TileC (&sums)[Shape::kTilesM][Shape::kTilesN], const __nv_bfloat16* x,
                                               const __nv_bfloat16* w) {
    TileB<__nv_bfloat16> b[kTermsW][Shape::kTilesN];
#pragma unroll
    for (int t = 0; t < kTermsW; t++)
#pragma unroll
        for (int j = 0; j < Shape::kTilesN; j++)
            load_b(b[t][j], w + (t * Shape::kN + j * kTileN) * Shape::kLd, Shape::kLd);
#pragma unroll
    for (int i = 0; i < Shape::kTilesM; i++)
#pragma unroll
        for (int tx = 0; tx < kTermsX; tx++) {
            TileA<__nv_bfloat16> a;
            load_a(a, x + (tx * Shape::kM + i * kTileM) * Shape::kLd, Shape::kLd);
#pragma unroll
            for (int tw = 0; tw < kTermsW; tw++)
                if (tx + tw < 2)
#pragma unroll
                    for (int j = 0; j < Shape::kTilesN; j++) multiply(sums[i][j], a, b[tw][j]);
        }
}

// Rows first_m … and columns first_n … of job.out.
template <typename Shape, int kTermsX, typename Source>
__device__ __forceinline__ void multiply_block(const GemmJob& job, const Source& source, int first_m, int first_n,
                                               unsigned char* memory) {
    constexpr int kTermsW = Source::kTerms;
    constexpr int kStageX = kTermsX * Shape::kM * Shape::kLd, kStageW = kTermsW * Shape::kN * Shape::kLd;
    __nv_bfloat16* shared_x = reinterpret_cast<__nv_bfloat16*>(memory);
    __nv_bfloat16* shared_w = shared_x + job.stages * kStageX;
    const int w_stages = Source::kCopied ? job.stages : 2;

    const int n_steps = (job.n_cols + Shape::kK - 1) / Shape::kK;
    const int wave = threadIdx.x / kTileLanes;
    const int wave_m = wave % kWavesM * Shape::kWaveM, wave_n = wave / kWavesM * Shape::kWaveN;

    typename Source::Fetched fetched;  // the next step's weights
    source.template fetch<Shape>(fetched, first_n, 0);
    wait_for_previous();

    const auto copy = [&](int step) {
        if (step < n_steps) {
            __nv_bfloat16* to = shared_x + (step & (job.stages - 1)) * kStageX;
            copy_rows<Shape, Shape::kM>(to, job.x_hi, first_m, job.m, job.n_cols, step);
            if constexpr (kTermsX == 2)
                copy_rows<Shape, Shape::kM>(to + Shape::kM * Shape::kLd, job.x_lo, first_m, job.m, job.n_cols, step);
            source.template copy<Shape>(shared_w + (step & (w_stages - 1)) * kStageW, first_n, step);
        }
        commit_copies();  // also of nothing, so that the count of groups tells the step
    };
    for (int step = 0; step < job.stages - 1; step++) copy(step);
    source.template put<Shape>(shared_w, fetched, 0);
    source.template fetch<Shape>(fetched, first_n, 1);

    TileC sums[Shape::kTilesM][Shape::kTilesN];
#pragma unroll
    for (int i = 0; i < Shape::kTilesM; i++)
#pragma unroll
        for (int j = 0; j < Shape::kTilesN; j++)
#pragma unroll
            for (int e = 0; e < kTileElements; e++) sums[i][j].x[e] = 0;

    for (int step = 0; step < n_steps; step++) {
        if (job.stages == 4)
            wait_copies<2>();
        else
            wait_copies<0>();
        __syncthreads();  // this step has arrived for all; the room of the one before is free
        copy(step + job.stages - 1);
        if (step + 1 < n_steps) {
            source.template put<Shape>(shared_w + ((step + 1) & (w_stages - 1)) * kStageW, fetched, step + 1);
            source.template fetch<Shape>(fetched, first_n, step + 2);
        }
        const __nv_bfloat16* x = shared_x + (step & (job.stages - 1)) * kStageX + wave_m * Shape::kLd;
        const __nv_bfloat16* w = shared_w + (step & (w_stages - 1)) * kStageW + wave_n * Shape::kLd;
#pragma unroll(kPlainTiles ? 1 : Shape::kK / kTileK)
        for (int k = 0; k < Shape::kK; k += kTileK)
            if (step * Shape::kK + k < job.n_cols) multiply_tiles<Shape, kTermsX, kTermsW>(sums, x + k, w + k);
    }

#pragma unroll
    for (int i = 0; i < Shape::kTilesM; i++)
#pragma unroll
        for (int j = 0; j < Shape::kTilesN; j++)
#pragma unroll
            for (int e = 0; e < kTileElements; e++) {
                const int m = first_m + wave_m + i * kTileM + tile_row(e);
                const int n = first_n + wave_n + j * kTileN + tile_col(e);
                if (m < job.m && n < job.n) job.out[static_cast<size_t>(m) * job.ld_out + n] = sums[i][j].x[e];
            }
}

template <typename Shape, typename Source, int kTermsX>
__global__ void __launch_bounds__(kGemmThreads, Shape::kBlocks) gemm_kernel(GemmJob job, Source source) {
    SHARED_MEMORY(memory);
    const int first_m = blockIdx.x * Shape::kM, first_n = blockIdx.y * Shape::kN;
    if constexpr (!kPlainTiles) {
        multiply_block<Shape, kTermsX>(job, source, first_m, first_n, memory);
    } else {
        for (int m = first_m; m < min(first_m + Shape::kM, job.m); m += SmallShape::kM)
            for (int n = first_n; n < min(first_n + Shape::kN, job.n); n += SmallShape::kN) {
                multiply_block<SmallShape, kTermsX>(job, source, m, n, memory);
                __syncthreads();  // the next one writes where this one reads
            }
    }
}

}  // namespace gemmart::gpu
