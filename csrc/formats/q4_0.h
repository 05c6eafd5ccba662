// w = d · (q - 8)
//
//   byte 0   2                    18
//        | d | qs: low halves are weights 0 … 15, high halves 16 … 31 |
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockQ4_0 {
    static constexpr int kSize = 32;
    uint16_t d;  // half
    uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_0) == 18);

static inline GEMMART_HD void decode(const BlockQ4_0& b, float* out) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < 16; i++) {
        out[i] = d * ((b.qs[i] & 15) - 8);
        out[i + 16] = d * ((b.qs[i] >> 4) - 8);
    }
}

}  // namespace gemmart
