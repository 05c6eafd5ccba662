#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockBF16 {
    static constexpr int kSize = 1;
    uint16_t x;  // the upper half of a float
};
static_assert(sizeof(BlockBF16) == 2);

static inline GEMMART_HD void decode(const BlockBF16& b, float* out) { out[0] = bfloat16_to_float(b.x); }

}  // namespace gemmart
