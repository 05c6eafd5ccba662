// F32, F16, BF16: to nearest even.
#pragma once

#include "cpu/convert.h"
#include "formats/bf16.h"
#include "formats/f16.h"
#include "formats/f32.h"

namespace gemmart {

inline void encode(const float* x, const float*, BlockF32& b) { b.x = *x; }
inline void encode(const float* x, const float*, BlockF16& b) { b.x = cpu::float_to_half(*x); }
inline void encode(const float* x, const float*, BlockBF16& b) { b.x = cpu::float_to_bfloat16(*x); }

}  // namespace gemmart
