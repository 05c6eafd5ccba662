// w = d · level, one of 16 levels, denser around zero
//
//   byte 0   2                    18
//        | d | qs: low halves are weights 0 … 15, high halves 16 … 31 |
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockIQ4_NL {
    static constexpr int kSize = 32;
    uint16_t d;  // half
    uint8_t qs[16];
};
static_assert(sizeof(BlockIQ4_NL) == 18);

GEMMART_TABLE int8_t kIQ4Levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static inline GEMMART_HD void decode(const BlockIQ4_NL& b, float* out) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < 16; i++) {
        out[i] = d * kIQ4Levels[b.qs[i] & 15];
        out[i + 16] = d * kIQ4Levels[b.qs[i] >> 4];
    }
}

}  // namespace gemmart
