// Attention with AVX-512: attention_simd.h on the vectors of simd_avx512.h, which therefore comes first.
#include "cpu/simd_avx512.h"

#include "cpu/attention_simd.h"

namespace gemmart::cpu {

void fill_attention_avx512vnni(Kernels& k) { fill_attention(k); }

}  // namespace gemmart::cpu
