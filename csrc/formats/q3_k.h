// w = (d · (scale - 32)) · (q - 4), q of 3 bits; a scale of 6 bits for each 16 weights
//
//   byte 0      32   96      108  110
//        | hmask | qs | scales | d |
//
//   hmask    bit s of byte j is bit 2 of weight 32s + j
//   qs       two halves of 128 weights, 32 bytes each; bits 0, 1 of weight 32s + j of a half are bits 2s, 2s+1 of byte
//   j scale k  bits 0 … 3 in byte k mod 8 of scales (low halves for k < 8, high halves for the others),
//            bits 4, 5 in byte 8 + k mod 4, from bit 2⌊k/4⌋
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockQ3_K {
    static constexpr int kSize = 256;
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];
    uint16_t d;  // half
};
static_assert(sizeof(BlockQ3_K) == 110);

// The scale of weights 16k … 16k+15, -32 … 31.
static inline GEMMART_HD int q3_k_scale(const uint8_t* scales, int k) {
    return ((scales[k % 8] >> 4 * (k / 8) & 15) | (scales[8 + k % 4] >> 2 * (k / 4) & 3) << 4) - 32;
}

static inline GEMMART_HD void decode(const BlockQ3_K& b, float* out) {
    const float d = half_to_float(b.d);
    for (int k = 0; k < 16; k++) {
        const float dl = d * q3_k_scale(b.scales, k);
        const uint8_t* qs = b.qs + 32 * (k / 8) + 16 * (k % 2);
        const uint8_t* hmask = b.hmask + 16 * (k % 2);
        for (int j = 0; j < 16; j++) {
            const int q = (qs[j] >> 2 * (k / 2 % 4) & 3) | (hmask[j] >> k / 2 & 1) << 2;
            out[16 * k + j] = dl * (q - 4);
        }
    }
}

}  // namespace gemmart
