// w = ± ((d · (0.5 + scale)) · 0.25) · magnitude; a scale of 4 bits for each 16 weights, magnitudes in groups of 8 from
// a codebook of 512
//
//   byte 0   2    66       74
//        | d | qs | scales |
//
//   qs       for each 8 weights a word of 16 bits: 9 bits of codebook entry, 7 bits of signs
//   scales   low half first
#pragma once

#include "formats/grids.h"

namespace gemmart {

struct GEMMART_PACKED BlockIQ2_XS {
    static constexpr int kSize = 256;
    uint16_t d;  // half
    uint16_t qs[32];
    uint8_t scales[8];
};
static_assert(sizeof(BlockIQ2_XS) == 74);

static inline GEMMART_HD void decode(const BlockIQ2_XS& b, float* out) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < 32; i++) {
        const float db = d * (0.5f + (b.scales[i / 4] >> 4 * (i / 2 % 2) & 15)) * 0.25f;
        iq2_group(db, kIQ2XSGrid[b.qs[i] & 511], even_signs(b.qs[i] >> 9), out + 8 * i);
    }
}

}  // namespace gemmart
