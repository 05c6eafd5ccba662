// How the CPU executor lays out weights and activations. Plain data, included by every ISA: no function here has
// linkage.
//
// WEIGHTS stand in panels of kPanel = 16 rows, so that a vector lane belongs to one output row and nothing is ever
// summed across lanes. A panel is the sequence of its blocks in order of column; a packed block holds kPanel blocks of
// the file, permuted: no number is changed and no byte added. What is used first stands first, so that the hardware
// sees one stream and reads ahead. "Slot" s of a group of 32 columns is its columns 4s … 4s+3 for all rows: [16
// rows][4].
//
// clang-format off
//   Q4_0    d f16[16] | qs [4 slots][16][4]: slot s < 4: low nibbles of qs[s]; slot s >= 4: high nibbles of qs[s - 4]
//   Q4_1    d f16[16] | m f16[16] | qs as Q4_0
//   Q5_0    d f16[16] | qh u64[8 slots] | qs as Q4_0: bit 4r + b of qh[s] is the fifth bit of row r, column 4s + b
//   Q5_1    d f16[16] | m f16[16] | qh u64[8 slots] | qs as Q5_0
//   Q8_0    d f16[16] | qs int8 [8 slots][16][4]
//   IQ4_NL  as Q4_0; a nibble is the number of a level
//   Q2_K    d f16[16] | dmin f16[16] | sc [16 half groups][16]: low nibble scale, high nibble minimum | qs [2 halves][8][16][4]
//           group g = 4 h + j: slot s: two bits 2 j of qs[h][s]; half group 2 g + (s >= 4)
//   Q3_K    d f16[16] | sc_lo [8][16] | sc_hi [4][16] | 2 halves of: qh u64 [4 groups][8 slots] | qs [8][16][4] as Q2_K: bit 2
//           from qh
//           16 half groups i: scale + 32 = (nibble i / 8 of sc_lo[i % 8]) | (two bits 2 (i / 4) of sc_hi[i % 4]) << 4
//   Q4_K    d f16[16] | dmin f16[16] | sc_lo [4][16] | m_lo [4][16] | sc_hi [2][16] | m_hi [2][16] | qs [4 pairs][8 slots][16][4]
//           8 groups g: scale = (nibble g & 1 of sc_lo[g / 2]) | (two bits 2 (g % 4) of sc_hi[g / 4]) << 4, the minimum
//           likewise; slot s of group g: nibble g & 1 of qs[g / 2][s]
//   Q5_K    as Q4_K to m_hi, then 4 pairs of: qh u64 [2 groups][8 slots] | qs [8 slots][16][4]
//   Q6_K    d f16[16] | sc int8 [16 half groups][16] | 2 halves of: [8 slots] of (ql [16][4] | qh [16][4]) | ql [8 slots][16][4]
//           group g = 4 h + j: slot s: nibble j >> 1 of the half's ql number 8 (j & 1) + s, two bits 2 j of its qh[s]; half
//           group 2 g + (s >= 4)
//   IQ4_XS  d f16[16] | sc_lo [4][16] | sc_hi [2][16] | qs [8 groups] as Q4_0: scale - 32 as Q4_K, levels as IQ4_NL
//   IQ1_S   d f16[16] | qs u32 [8 groups][16] | qh u16 [8][16]: both as in the file
//   IQ1_M   scales u16 [4][16] | qh u16 [8 groups][16] | qs u32 [8][16]: all as in the file
//   IQ2_XXS d f16[16] | qs u32 [8 groups][16]: the four entries | signs, whose free bits are the scale's
//   IQ2_XS  d f16[16] | scales [8 groups][16] | qs u32 [8][16]: eight bits of the four entries | signs: the ninth ones
//   IQ2_S   d f16[16] | scales [8 groups][16] | qh [8][16] | qs u32 [8][16] | signs
//   IQ3_XXS d f16[16] | qs u32 [16 half groups][16] | signs, whose free bits are the scale's
//   IQ3_S   d f16[16] | scales [4][16] | qh [8 groups][16] | qs u32 [16 half groups][16] | signs
//   TQ1_0   d f16[16] | qs u32 [12][16] | qh u32 [16]
//   TQ2_0   d f16[16] | qs [2 halves][8][16][4] as Q2_K
//   MXFP4   e [16] | qs as Q4_0
//           signs u64 [8 groups][2][4]: bit 4r + b of [h][j] is the sign of row r, column 8j + 4h + b. IQ2_XXS, IQ2_XS
//           and IQ3_XXS store seven signs of eight: bit 4r + 3 of [1][j] is free for a bit j of other numbers
//   F32     f32 [n_cols][16]
//   F16     f16 [n_cols][16]
//   BF16    bf16 [n_cols / 2][16][2]
// clang-format on
//
// Every integer format is, in each group, weight = scale · (u − bias) − offset with an unsigned byte u: bias 4 for
// Q3_K, 8 for Q4_0, 16 for Q5_0, 32 for Q6_K, 128 for Q8_0 (u = q + 128), IQ4_NL and IQ4_XS (u = level + 128), 1 for
// TQ1_0 and TQ2_0, 16 for MXFP4 and IQ3_S, 64 for IQ2_XXS, IQ2_XS, IQ2_S and IQ3_XXS, 16 for IQ1_S and IQ1_M, whose
// scale counts eighths (u = 8 · level ± 1 + 16), otherwise 0; half groups with scales of their own have IQ1_M, IQ2_XS
// and IQ2_S too; the offset is −m for Q4_1 and Q5_1, dmin · m for Q2_K (per half group), Q4_K and Q5_K, otherwise 0.
// Formats that are not in the list stay in rows as in the file and are decoded to an F32 panel where they are used.
//
// ACTIVATIONS, n_tokens columns, stand in column groups of width 16, … 16, then 8, 4, 2, 1 for the rest. The group that
// begins at column c with width w begins at element c · (elements a column) of each array:
//   q     int8  [n_cols / 32][w][32]  x ≈ d · v with v = q, |q| <= 127, one scale for kGroup = 32 numbers, whose
//               significand has four bits: one of kSignificands numbers times a power of 2, so that few products of it
//               with a weight's scale exist
//   q_low int8  the same, or null: a second term, |q_low| <= 127, for what rounding to q has lost: v = 256 q + q_low
//   d     float [n_cols / 32][w]
//   significand int32, exponent float [n_cols / 32][w]: d = (1 + significand / kSignificands) · 2^exponent; where d is
//               infinite or NaN the exponent is too
//   s32   int32 [n_cols / 32][w]      −Σ v over 32 numbers: times the bias, where the dot of a group begins
//   s16   int32 [n_cols / 16][w]      −Σ v over 16 numbers
//   ds32  float [n_cols / 32][w]      d · Σ v over 32 numbers
//   ds16  float [n_cols / 16][w]      d · Σ v over 16 numbers
//   x     float [n_cols][w]           unrounded, for the float formats
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace gemmart::cpu {

inline constexpr int kPanel = 16;     // rows a panel
inline constexpr int kGroup = 32;     // columns an activation scale
inline constexpr int kMaxWidth = 16;  // columns a column group
inline constexpr int kSignificands = 8;
inline constexpr int kBlock = 256;  // n_cols of every matrix is a multiple of kGroup; K formats need kBlock

struct Matrix {
    DType dtype;
    bool packed;  // panels as above; otherwise rows as in the file
    int n_rows, n_cols;
    const std::byte* data;  // [ceil(n_rows / 16)] panels, or [n_rows] rows
    size_t stride;          // bytes a panel, or a row
};

struct ActivationArrays {
    int8_t *q, *q_low;
    float* d;
    int32_t* significand;
    float *exponent, *ds32, *ds16;
    int32_t *s32, *s16;
    float* x;
};

struct Activations {
    int n_tokens;
    int n_cols;
    ActivationArrays data;
};

static inline int column_group_width(int n_left) {
    return n_left >= 16 ? 16 : n_left >= 8 ? 8 : n_left >= 4 ? 4 : n_left >= 2 ? 2 : 1;
}

// The arrays from element `at` on, the beginning of a column group.
static inline ActivationArrays arrays_at(const ActivationArrays& a, size_t at) {
    return {a.q + at,
            a.q_low ? a.q_low + at : nullptr,
            a.d + at / 32,
            a.significand + at / 32,
            a.exponent + at / 32,
            a.ds32 + at / 32,
            a.ds16 + at / 16,
            a.s32 + at / 32,
            a.s16 + at / 16,
            a.x + at};
}

// The arrays from column c of a column group on.
static inline ActivationArrays arrays_from(const ActivationArrays& a, int c) {
    const size_t q = static_cast<size_t>(c) * kGroup;
    return {a.q + q,        a.q_low ? a.q_low + q : nullptr,
            a.d + c,        a.significand + c,
            a.exponent + c, a.ds32 + c,
            a.ds16 + c,     a.s32 + c,
            a.s16 + c,      a.x + c};
}

// scale, rounded up to four bits if it is a normal number.
static inline float activation_scale(float scale) {
    uint32_t bits;
    __builtin_memcpy(&bits, &scale, 4);
    if (bits < 0x00800000 || bits >= 0x7f000000) return scale;
    bits = (bits + 0x000fffff) & 0xfff00000;
    __builtin_memcpy(&scale, &bits, 4);
    return scale;
}

// Group g of column c in a column group of width w: its scale, and the sums of its halves' v.
static inline void put_sums(const ActivationArrays& to, int g, int w, int c, float scale, int sum0, int sum1) {
    const int at = g * w + c, half0 = 2 * g * w + c, half1 = half0 + w;
    uint32_t bits;
    __builtin_memcpy(&bits, &scale, 4);
    to.d[at] = scale;
    to.significand[at] = bits >> 20 & (kSignificands - 1);
    to.exponent[at] = bits < 0x7f800000 ? static_cast<float>(static_cast<int>(bits >> 23) - 127) : scale;
    to.s32[at] = -(sum0 + sum1);
    to.ds32[at] = scale * (sum0 + sum1);
    to.s16[half0] = -sum0, to.s16[half1] = -sum1;
    to.ds16[half0] = scale * sum0, to.ds16[half1] = scale * sum1;
}

}  // namespace gemmart::cpu
