// The kernels of the CPU executor: one pointer each, filled by the scalar table and overridden by stronger ISAs
// (isas.def). Results do not depend on the number of columns, rows or threads of a call: each output is one chain of
// float operations in order of the column (matmul) or position (attention), the same in every call of one ISA.
#pragma once

#include "cpu/layout.h"
#include "decoder.h"
#include "kv_cache.h"

namespace gemmart::cpu {

// Scratch that every kernel call may overwrite; one a thread, 64-byte aligned.
inline constexpr size_t kScratchBytes = 1 << 20;

// The softmax of a row is computed by ranges: positions [i · kRange, (i + 1) · kRange) by themselves, then added to the
// ranges before. So several threads can share one row and its bits stay the same.
inline constexpr int kRange = 8 * kPageTokens;
inline constexpr int kMaxAttentionRows = 128;  // of a call
inline constexpr int kMaxHeadDim = 1024;

// What some ranges add to a row: Σ weight · value [head_dim, rounded up to 32], then m and Σ weight, where the weight
// of a score is exp(score − m) and m the largest score.
static constexpr int partial_size(int head_dim) { return (head_dim + 31) / 32 * 32 + 16; }

struct AttentionJob {
    KvType type;
    KvHeadLayout layout;
    int head_dim;  // at most kMaxHeadDim
    int n_rows;    // at most kMaxAttentionRows; they share this kv head: some tokens of one sequence × the heads of a
                   // group
    const float* const* queries;  // [n_rows] of [head_dim], scaled
    const int* positions;         // [n_rows] of each query
    int window;                   // 0: none
    float softcap;                // 0: none
    const std::byte* const*
        pages;  // by page number: this kv head's part; pages outside of every row's window are not read
    int range_begin, range_end;  // to compute
    float* partials;             // row r's at r · ld_partials
    size_t ld_partials;
};

struct Kernels {
    const char* isa;

    // n columns of n_cols numbers, the columns from `to` on of a column group of width w. d = max|x| / 127,
    // rounded up to a significand of four bits, q = round to nearest even (x / d); a block with a NaN or an infinity
    // gets a d that is not finite, so that the fault reaches the logits; q is 0 where d is not a normal number. With a
    // second term d is a 256th of that, and q_low = round
    // ((x − 256 d q) / d), at most 127.
    void (*quantize)(const float* const* x, int n, int w, int n_cols, const ActivationArrays& to);
    // A column group of width w as x [n_cols][w].
    void (*interleave)(const float* const* x, int w, int n_cols, float* out);

    // out[c · ld_out + r] = Σ_k w[r, k] · x[k, c] for rows r of panels [panel_begin, panel_end) and all columns c.
    // Integer formats: in each group of 32 columns, t = scale · Σ (u − bias) v (where half groups have scales: scale0 ·
    // Σ + scale1 · Σ, two half groups), sum = sum + t · d, and where there is an offset sum = sum − offset · ds32 (half
    // groups: twice, with ds16); groups in order. Σ (u − bias) v is exact. With AVX-512, where a group
    // has one scale, the significand of d is taken into it, which is exact too, and t times the power of 2 is added.
    // Float formats (AMX has an order of its own for BF16): the sum of a group of 32 columns in order, then added to
    // the total; groups in order. Against float64: |error| <= 1e-5 · Σ |w · x| + 1e-6 · Σ |offset · x|. out must not
    // alias anything; nothing is written beyond row n_rows - 1.
    void (*matmul)(const Matrix& w, const Activations& x, int panel_begin, int panel_end, float* out, size_t ld_out,
                   std::byte* scratch);

    // out[i] = x[i] · weight[i] / sqrt(mean(x²) + eps); out may be x. The squares are added in 16 lanes (i mod 16),
    // then by a fixed tree.
    void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
    // x[i] += y[i]
    void (*add)(float* x, const float* y, int n);
    // x[i] *= s
    void (*scale)(float* x, float s, int n);
    // out[i] = act(gate[i]) · up[i]; out may be gate.
    void (*gate)(Activation act, const float* gate, const float* up, int n, float* out);
    // x[i] = cap · tanh(x[i] / cap), absolute error <= 3e-7 · cap
    void (*softcap)(float* x, int n, float cap);
    // Of a row of logits: whether all are finite; the first i >= begin with x[i] > limit, or n; Σ e^(x[i] − from) with
    // from >= every x[i], relative error <= 1e-6 + 1.2e-7 · (from − the x[i] that weigh most).
    bool (*all_finite)(const float* x, int n);
    int (*find_above)(const float* x, int begin, int n, float limit);
    double (*sum_exp)(const float* x, int n, float from);
    // Rotates pairs of x [head_dim] by angles with the given cosines and sines [head_dim / 2].
    void (*rope)(float* x, const float* cosines, const float* sines, int head_dim, bool neox);

    // Writes one position's key and value [head_dim] into a head's part of a page.
    void (*store_kv)(KvType type, const KvHeadLayout& layout, int head_dim, const float* key, const float* value,
                     int slot, std::byte* part);
    // partials[r] <- Σ_p exp(score_p − m) · value_p, m and Σ_p exp(score_p − m), score_p = cap(queries[r] · key_p),
    // over those p in [max(0, pos − window + 1), pos] that lie in the job's ranges; zeros where there are none. Within
    // a range sums go in order of position, ranges are added in order. For Q8_0 keys a query may be rounded: by at most
    // 1/64516 of its largest component in a block of 32, where the keys' own rounding is 1/254.
    void (*attention)(const AttentionJob& job, std::byte* scratch);
    // out [head_dim] = the softmax of n partials [n][partial_size]: one of all ranges, or those of single ranges in
    // order; both give the same bits.
    void (*merge)(const float* partials, int n, int head_dim, float* out);

    // The limit of products, for measurements: the multiply instruction of the integer formats and of the float formats
    // on independent sums in registers, and nothing else. Return how many numbers were multiplied.
    int64_t (*multiply_int8)(int rounds);
    int64_t (*multiply_float)(int rounds);
};

// ISAs of this build that this CPU can run, weakest first; the last is the default.
struct IsaStatus {
    const char* name;
    bool built;
    bool usable;
    std::string why_not;
};
std::vector<IsaStatus> isas();
// Throws DeviceError naming what is missing for an ISA that is unknown, not built or not usable; "" is the best one, or
// GEMMART_ISA.
const Kernels& kernels_for(const std::string& isa);

// Packing (pack.cpp). Formats without a packed layout have panel_bytes 0.
size_t panel_bytes(DType dtype, int n_cols);
// n_valid <= 16 rows at rows + r · row_stride; missing rows become zero.
void pack_panel(DType dtype, const std::byte* rows, size_t row_stride, int n_valid, int n_cols, std::byte* panel);

}  // namespace gemmart::cpu
