// Attention with AVX-512.
#include "cpu/simd_avx512.h"
// the vectors first
#include "cpu/attention_simd.h"

namespace gemmart::cpu {

void fill_attention_avx512vnni(Kernels& k) { fill_attention(k); }

}  // namespace gemmart::cpu
