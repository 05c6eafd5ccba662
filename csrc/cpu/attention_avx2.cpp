// Attention with AVX2: attention_simd.h on the vectors of simd_avx2.h, which therefore comes first.
#include "cpu/simd_avx2.h"

#include "cpu/attention_simd.h"

namespace gemmart::cpu {

void fill_attention_avx2(Kernels& k) { fill_attention<FloatProducts>(k); }

}  // namespace gemmart::cpu
