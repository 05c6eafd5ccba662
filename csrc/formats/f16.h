#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockF16 {
    static constexpr int kSize = 1;
    uint16_t x;  // IEEE half
};
static_assert(sizeof(BlockF16) == 2);

static inline GEMMART_HD void decode(const BlockF16& b, float* out) { out[0] = half_to_float(b.x); }

}  // namespace gemmart
