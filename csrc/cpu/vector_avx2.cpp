// Element-wise kernels with AVX2: vector_simd.h on the vectors of simd_avx2.h, which therefore comes first.
#include "cpu/simd_avx2.h"

#include "cpu/vector_simd.h"

namespace gemmart::cpu {

void fill_vector_avx2(Kernels& k) { fill_vector(k); }

}  // namespace gemmart::cpu
