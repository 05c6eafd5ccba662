// w = d · q
//
//   byte 0   2               34
//        | d | qs: 32 × int8 |
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockQ8_0 {
    static constexpr int kSize = 32;
    uint16_t d;  // half
    int8_t qs[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

static inline GEMMART_HD void decode(const BlockQ8_0& b, float* out) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < 32; i++) out[i] = d * b.qs[i];
}

}  // namespace gemmart
