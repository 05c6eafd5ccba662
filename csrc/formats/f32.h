#pragma once

#include "formats/common.h"

namespace gemmart {

struct GEMMART_PACKED BlockF32 {
    static constexpr int kSize = 1;
    float x;
};
static_assert(sizeof(BlockF32) == 4);

static inline GEMMART_HD void decode(const BlockF32& b, float* out) { out[0] = b.x; }

}  // namespace gemmart
