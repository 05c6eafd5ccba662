// w = (d · (scale - 32)) · level, one of the 16 levels of IQ4_NL; a scale of 6 bits for each 32 weights
//
//   byte 0   2          4          8    136
//        | d | scales_h | scales_l | qs |
//
//   scales_l, scales_h   4 low bits (low half first), 2 high bits (low bits first) of each scale
//   qs                   for each 32 weights 16 bytes: low halves are weights 0 … 15, high halves 16 … 31
#pragma once

#include "formats/iq4_nl.h"

namespace gemmart {

struct GEMMART_PACKED BlockIQ4_XS {
    static constexpr int kSize = 256;
    uint16_t d;  // half
    uint16_t scales_h;
    uint8_t scales_l[4];
    uint8_t qs[128];
};
static_assert(sizeof(BlockIQ4_XS) == 136);

// The scale of weights 32k … 32k+31, -32 … 31.
static inline GEMMART_HD int iq4_xs_scale(const BlockIQ4_XS& b, int k) {
    return ((b.scales_l[k / 2] >> 4 * (k % 2) & 15) | (b.scales_h >> 2 * k & 3) << 4) - 32;
}

static inline GEMMART_HD void decode(const BlockIQ4_XS& b, float* out) {
    const float d = half_to_float(b.d);
    for (int k = 0; k < 8; k++) {
        const float dl = d * iq4_xs_scale(b, k);
        const uint8_t* qs = b.qs + 16 * k;
        for (int j = 0; j < 16; j++) {
            out[32 * k + j] = dl * kIQ4Levels[qs[j] & 15];
            out[32 * k + 16 + j] = dl * kIQ4Levels[qs[j] >> 4];
        }
    }
}

}  // namespace gemmart
