// w = 2^(e - 128) · level, a float of 4 bits whose levels are stored doubled (the OCP microscaling format MXFP4)
//
//   byte 0   1                    17
//        | e | qs: low halves are weights 0 … 15, high halves 16 … 31 |
#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockMXFP4 {
    static constexpr int kSize = 32;
    uint8_t e;
    uint8_t qs[16];
};
static_assert(sizeof(BlockMXFP4) == 17);

GEMMART_TABLE int8_t kMXFP4Levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// 2^(e - 128); the first two are denormal.
static inline GEMMART_HD float mxfp4_scale(uint8_t e) {
    return float_from_bits(e < 2 ? 0x200000u << e : static_cast<uint32_t>(e - 1) << 23);
}

static inline GEMMART_HD void decode(const BlockMXFP4& b, float* out) {
    const float d = mxfp4_scale(b.e);
    for (int i = 0; i < 16; i++) {
        out[i] = d * kMXFP4Levels[b.qs[i] & 15];
        out[i + 16] = d * kMXFP4Levels[b.qs[i] >> 4];
    }
}

}  // namespace gemmart
