// w = ± (d · (1 + 2 · scale)) · magnitude; a scale of 4 bits for each 32 weights, magnitudes in groups of 4 from a
// codebook of 512
//
//   byte 0   2    66   74      106      110
//        | d | qs | qh | signs | scales |
//
//   qs, qh   for each 4 weights the codebook entry: 8 bits in qs, 1 more in qh (low bits first)
//   signs    bit i of byte k: weight 8k + i is negative
//   scales   low half first
#pragma once

#include "formats/grids.h"

namespace gemmart {

struct GEMMART_PACKED BlockIQ3_S {
    static constexpr int kSize = 256;
    uint16_t d;  // half
    uint8_t qs[64];
    uint8_t qh[8];
    uint8_t signs[32];
    uint8_t scales[4];
};
static_assert(sizeof(BlockIQ3_S) == 110);

static inline GEMMART_HD void decode(const BlockIQ3_S& b, float* out) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < 64; i++) {
        const float db = d * (1 + 2 * (b.scales[i / 16] >> 4 * (i / 8 % 2) & 15));
        const int entry = b.qs[i] | (b.qh[i / 8] >> i % 8 & 1) << 8;
        iq3_group(db, kIQ3SLevels, kIQ3SGrid[entry], b.signs[i / 2] >> 4 * (i % 2), out + 4 * i);
    }
}

}  // namespace gemmart
