// w = (d · scale) · q - (dmin · min), q of 5 bits; scale and min of 6 bits for each 32 weights
//
//   byte 0   2      4        16   48   176
//        | d | dmin | scales | qh | qs |
//
//   scales   as in Q4_K
//   qh       bit s of byte j is bit 4 of weight 32s + j
//   qs       four parts of 64 weights, 32 bytes each: low halves are the first 32 weights, high halves the others
#pragma once

#include "formats/q4_k.h"

namespace gemmart {

struct GEMMART_PACKED BlockQ5_K {
    static constexpr int kSize = 256;
    uint16_t d;     // half
    uint16_t dmin;  // half
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
};
static_assert(sizeof(BlockQ5_K) == 176);

static inline GEMMART_HD void decode(const BlockQ5_K& b, float* out) {
    const float d = half_to_float(b.d);
    const float dmin = half_to_float(b.dmin);
    for (int k = 0; k < 8; k++) {
        const float dl = d * q4_k_scale(b.scales, k);
        const float ml = dmin * q4_k_min(b.scales, k);
        const uint8_t* qs = b.qs + 32 * (k / 2);
        const int shift = 4 * (k % 2);
        for (int j = 0; j < 32; j++) {
            const int q = (qs[j] >> shift & 15) | (b.qh[j] >> k & 1) << 4;
            out[32 * k + j] = dl * q - ml;
        }
    }
}

}  // namespace gemmart
