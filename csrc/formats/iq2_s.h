// w = ± ((d · (0.5 + scale)) · 0.25) · magnitude; a scale of 4 bits for each 16 weights, magnitudes in groups of 8 from
// a codebook of 1024
//
//   byte 0   2    34      66   74       82
//        | d | qs | signs | qh | scales |
//
//   qs, qh   for each 8 weights the codebook entry: 8 bits in qs, 2 more in qh (low bits first)
//   signs    bit i of a byte: weight i of the 8 is negative
//   scales   low half first
#pragma once

#include "formats/grids.h"

namespace gemmart {

struct GEMMART_PACKED BlockIQ2_S {
    static constexpr int kSize = 256;
    uint16_t d;  // half
    uint8_t qs[32];
    uint8_t signs[32];
    uint8_t qh[8];
    uint8_t scales[8];
};
static_assert(sizeof(BlockIQ2_S) == 82);

static inline GEMMART_HD void decode(const BlockIQ2_S& b, float* out) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < 32; i++) {
        const float db = d * (0.5f + (b.scales[i / 4] >> 4 * (i / 2 % 2) & 15)) * 0.25f;
        const int entry = b.qs[i] | (b.qh[i / 4] >> 2 * (i % 4) & 3) << 8;
        iq2_group(db, kIQ2SGrid[entry], b.signs[i], out + 8 * i);
    }
}

}  // namespace gemmart
