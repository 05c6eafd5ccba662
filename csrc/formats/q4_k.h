// w = (d · scale) · q - (dmin · min), q of 4 bits; scale and min of 6 bits for each 32 weights
//
//   byte 0   2      4        16   144
//        | d | dmin | scales | qs |
//
//   scales   12 bytes for s0 … s7 and m0 … m7; bits 4, 5 of the later four fill the top of the first eight bytes:
//              byte 0 … 3    s4 … s7 [5:4] · s0 … s3
//              byte 4 … 7    m4 … m7 [5:4] · m0 … m3
//              byte 8 … 11   m4 … m7 [3:0] · s4 … s7 [3:0]
//   qs       four parts of 64 weights, 32 bytes each: low halves are the first 32 weights, high halves the others
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockQ4_K {
    static constexpr int kSize = 256;
    uint16_t d;     // half
    uint16_t dmin;  // half
    uint8_t scales[12];
    uint8_t qs[128];
};
static_assert(sizeof(BlockQ4_K) == 144);

// Scale and min of weights 32k … 32k+31, each 0 … 63. Q5_K packs them in the same way.
static inline GEMMART_HD int q4_k_scale(const uint8_t* scales, int k) {
    return k < 4 ? scales[k] & 63 : (scales[k + 4] & 15) | (scales[k - 4] >> 6) << 4;
}
static inline GEMMART_HD int q4_k_min(const uint8_t* scales, int k) {
    return k < 4 ? scales[k + 4] & 63 : scales[k + 4] >> 4 | (scales[k] >> 6) << 4;
}

static inline GEMMART_HD void decode(const BlockQ4_K& b, float* out) {
    const float d = half_to_float(b.d);
    const float dmin = half_to_float(b.dmin);
    for (int k = 0; k < 8; k++) {
        const float dl = d * q4_k_scale(b.scales, k);
        const float ml = dmin * q4_k_min(b.scales, k);
        const uint8_t* qs = b.qs + 32 * (k / 2);
        const int shift = 4 * (k % 2);
        for (int j = 0; j < 32; j++) out[32 * k + j] = dl * (qs[j] >> shift & 15) - ml;
    }
}

}  // namespace gemmart
