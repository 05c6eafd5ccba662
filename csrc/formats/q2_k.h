// w = (d · scale) · q - (dmin · min), q of 2 bits; scale and min of 4 bits for each 16 weights
//
//   byte 0       16   80  82     84
//        | scales | qs | d | dmin |
//
//   scales[k]   low half: scale, high half: min of weights 16k … 16k+15
//   qs          two halves of 128 weights, 32 bytes each; weight 32s + j of a half is bits 2s, 2s+1 of its byte j
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockQ2_K {
    static constexpr int kSize = 256;
    uint8_t scales[16];
    uint8_t qs[64];
    uint16_t d;     // half
    uint16_t dmin;  // half
};
static_assert(sizeof(BlockQ2_K) == 84);

static inline GEMMART_HD void decode(const BlockQ2_K& b, float* out) {
    const float d = half_to_float(b.d);
    const float dmin = half_to_float(b.dmin);
    for (int k = 0; k < 16; k++) {
        const float dl = d * (b.scales[k] & 15);
        const float ml = dmin * (b.scales[k] >> 4);
        const uint8_t* qs = b.qs + 32 * (k / 8) + 16 * (k % 2);
        const int shift = 2 * (k / 2 % 4);
        for (int j = 0; j < 16; j++) out[16 * k + j] = dl * (qs[j] >> shift & 3) - ml;
    }
}

}  // namespace gemmart
