// Attention with AVX2.
#include "cpu/simd_avx2.h"
// the vectors first
#include "cpu/attention_simd.h"

namespace gemmart::cpu {

void fill_attention_avx2(Kernels& k) { fill_attention(k); }

}  // namespace gemmart::cpu
