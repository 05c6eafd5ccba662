// Element-wise kernels with AVX-512: vector_simd.h on the vectors of simd_avx512.h, which therefore comes first.
#include "cpu/simd_avx512.h"

#include "cpu/vector_simd.h"

namespace gemmart::cpu {

void fill_vector_avx512vnni(Kernels& k) { fill_vector(k); }

}  // namespace gemmart::cpu
