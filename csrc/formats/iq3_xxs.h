// w = ± ((d · (0.5 + scale)) · 0.5) · magnitude; a scale of 4 bits for each 32 weights, magnitudes in groups of 4 from
// a codebook of 256
//
//   byte 0   2    66      98
//        | d | qs | signs |
//
//   qs      a codebook entry for each 4 weights
//   signs   for each 32 weights a word: 4 × 7 bits of signs, then the scale in the top 4 bits
#pragma once

#include "formats/grids.h"

namespace gemmart {

struct GEMMART_PACKED BlockIQ3_XXS {
    static constexpr int kSize = 256;
    uint16_t d;  // half
    uint8_t qs[64];
    uint32_t signs[8];
};
static_assert(sizeof(BlockIQ3_XXS) == 98);

static inline GEMMART_HD void decode(const BlockIQ3_XXS& b, float* out) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < 64; i++) {
        const uint32_t signs = b.signs[i / 8];
        const float db = d * (0.5f + (signs >> 28)) * 0.5f;
        const uint32_t eight = even_signs(signs >> 7 * (i / 2 % 4) & 127);
        iq3_group(db, kIQ3XXSLevels, kIQ3XXSGrid[b.qs[i]], eight >> 4 * (i % 2), out + 4 * i);
    }
}

}  // namespace gemmart
