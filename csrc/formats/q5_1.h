// w = d · q + m, q of 5 bits
//
//   byte 0   2   4    8                    24
//        | d | m | qh | qs: low halves are weights 0 … 15, high halves 16 … 31 |
//                  bit i of qh is bit 4 of weight i
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockQ5_1 {
    static constexpr int kSize = 32;
    uint16_t d;  // half
    uint16_t m;  // half
    uint32_t qh;
    uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_1) == 24);

static inline GEMMART_HD void decode(const BlockQ5_1& b, float* out) {
    const float d = half_to_float(b.d);
    const float m = half_to_float(b.m);
    const uint32_t qh = b.qh;
    for (int i = 0; i < 16; i++) {
        const int low = (b.qs[i] & 15) | static_cast<int>(qh >> i & 1) << 4;
        const int high = b.qs[i] >> 4 | static_cast<int>(qh >> (i + 16) & 1) << 4;
        out[i] = d * low + m;
        out[i + 16] = d * high + m;
    }
}

}  // namespace gemmart
