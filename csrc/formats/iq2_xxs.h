// w = ± ((d · (0.5 + scale)) · 0.25) · magnitude; a scale of 4 bits for each 32 weights, magnitudes in groups of 8 from
// a codebook of 256
//
//   byte 0   2    66
//        | d | qs |
//
//   qs   for each 32 weights two words: 4 × 8 bits of codebook entry; 4 × 7 bits of signs and 4 bits of scale
#pragma once

#include "formats/grids.h"

namespace gemmart {

struct GEMMART_PACKED BlockIQ2_XXS {
    static constexpr int kSize = 256;
    uint16_t d;  // half
    uint32_t qs[16];
};
static_assert(sizeof(BlockIQ2_XXS) == 66);

static inline GEMMART_HD void decode(const BlockIQ2_XXS& b, float* out) {
    const float d = half_to_float(b.d);
    for (int k = 0; k < 8; k++) {
        const uint32_t entries = b.qs[2 * k];
        const uint32_t signs = b.qs[2 * k + 1];
        const float db = d * (0.5f + (signs >> 28)) * 0.25f;
        for (int j = 0; j < 4; j++) {
            iq2_group(db, kIQ2XXSGrid[entries >> 8 * j & 255], even_signs(signs >> 7 * j & 127), out + 32 * k + 8 * j);
        }
    }
}

}  // namespace gemmart
