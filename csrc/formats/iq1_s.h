// w = (d · (2 · scale + 1)) · (level ± 1/8); scale and sign of the shift for each 32 weights, levels -1, 0, 1 in groups
// of 8 from a codebook of 2048
//
//   byte 0   2    34   50
//        | d | qs | qh |
//
//   qs   the low 8 bits of the codebook entry of each 8 weights
//   qh   for each 32 weights a word of 16 bits: 4 × 3 high bits of the entries, 3 bits of scale, 1 bit: shift down
#pragma once

#include "formats/grids.h"

namespace gemmart {

struct GEMMART_PACKED BlockIQ1_S {
    static constexpr int kSize = 256;
    uint16_t d;  // half
    uint8_t qs[32];
    uint16_t qh[8];
};
static_assert(sizeof(BlockIQ1_S) == 50);

static inline GEMMART_HD void decode(const BlockIQ1_S& b, float* out) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < 32; i++) {
        const int qh = b.qh[i / 4];
        const float dl = d * (2 * (qh >> 12 & 7) + 1);
        const int entry = b.qs[i] | (qh >> 3 * (i % 4) & 7) << 8;
        iq1_group(dl, kIQ1Grid[entry], qh & 0x8000 ? -0.125f : 0.125f, out + 8 * i);
    }
}

}  // namespace gemmart
