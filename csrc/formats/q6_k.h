// w = (d · scale) · (q - 32), q of 6 bits; a scale of 8 bits for each 16 weights
//
//   byte 0   128  192      208  210
//        | ql | qh | scales | d |
//
//   ql   bits 0 … 3: two halves of 128 weights, 64 bytes each; low halves are the first 64 weights, high halves the
//   others qh   bits 4, 5: two halves of 128 weights, 32 bytes each; weight 32s + j of a half has bits 2s, 2s+1 of its
//   byte j
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockQ6_K {
    static constexpr int kSize = 256;
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d;  // half
};
static_assert(sizeof(BlockQ6_K) == 210);

static inline GEMMART_HD void decode(const BlockQ6_K& b, float* out) {
    const float d = half_to_float(b.d);
    for (int k = 0; k < 16; k++) {
        const float dl = d * b.scales[k];
        const uint8_t* ql = b.ql + 64 * (k / 8) + 16 * (k % 4);
        const uint8_t* qh = b.qh + 32 * (k / 8) + 16 * (k % 2);
        for (int j = 0; j < 16; j++) {
            const int q = (ql[j] >> 4 * (k / 4 % 2) & 15) | (qh[j] >> 2 * (k / 2 % 4) & 3) << 4;
            out[16 * k + j] = dl * (q - 32);
        }
    }
}

}  // namespace gemmart
