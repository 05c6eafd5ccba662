// w = (d · (2 · scale + 1)) · (level ± 1/8); a scale for each 16 weights, the sign of the shift for each 8, levels -1,
// 0, 1 in groups of 8 from a codebook of 2048 (the one of IQ1_S)
//
//   byte 0    32   48       56
//        | qs | qh | scales |
//
//   qs       the low 8 bits of the codebook entry of each 8 weights
//   qh       4 bits for each 8 weights, low half first: 3 high bits of the entry, 1 bit: shift down
//   scales   four words of 16 bits, each 4 × 3 bits of scale, then 4 bits of d (a half), lowest first
#pragma once

#include "formats/grids.h"

namespace gemmart {

struct GEMMART_PACKED BlockIQ1_M {
    static constexpr int kSize = 256;
    uint8_t qs[32];
    uint8_t qh[16];
    uint16_t scales[4];
};
static_assert(sizeof(BlockIQ1_M) == 56);

static inline GEMMART_HD void decode(const BlockIQ1_M& b, float* out) {
    uint16_t d_bits = 0;
    for (int k = 0; k < 4; k++) d_bits |= b.scales[k] >> 12 << 4 * k;
    const float d = half_to_float(d_bits);
    for (int i = 0; i < 32; i++) {
        const float dl = d * (2 * (b.scales[i / 8] >> 3 * (i / 2 % 4) & 7) + 1);
        const int qh = b.qh[i / 2] >> 4 * (i % 2);
        const int entry = b.qs[i] | (qh & 7) << 8;
        iq1_group(dl, kIQ1Grid[entry], qh & 8 ? -0.125f : 0.125f, out + 8 * i);
    }
}

}  // namespace gemmart
