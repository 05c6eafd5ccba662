// w = d · q + m
//
//   byte 0   2   4                    20
//        | d | m | qs: low halves are weights 0 … 15, high halves 16 … 31 |
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockQ4_1 {
    static constexpr int kSize = 32;
    uint16_t d;  // half
    uint16_t m;  // half
    uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_1) == 20);

static inline GEMMART_HD void decode(const BlockQ4_1& b, float* out) {
    const float d = half_to_float(b.d);
    const float m = half_to_float(b.m);
    for (int i = 0; i < 16; i++) {
        out[i] = d * (b.qs[i] & 15) + m;
        out[i + 16] = d * (b.qs[i] >> 4) + m;
    }
}

}  // namespace gemmart
