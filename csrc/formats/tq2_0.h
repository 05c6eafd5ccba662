// w = d · (q - 1), q of 2 bits
//
//   byte 0    64  66
//        | qs | d |
//
//   qs   two halves of 128 weights, 32 bytes each; weight 32s + j of a half is bits 2s, 2s+1 of its byte j
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockTQ2_0 {
    static constexpr int kSize = 256;
    uint8_t qs[64];
    uint16_t d;  // half
};
static_assert(sizeof(BlockTQ2_0) == 66);

static inline GEMMART_HD void decode(const BlockTQ2_0& b, float* out) {
    const float d = half_to_float(b.d);
    for (int k = 0; k < 8; k++) {
        const uint8_t* qs = b.qs + 32 * (k / 4);
        for (int j = 0; j < 32; j++) out[32 * k + j] = d * ((qs[j] >> 2 * (k % 4) & 3) - 1);
    }
}

}  // namespace gemmart
