// Element-wise kernels with AVX2.
#include "cpu/simd_avx2.h"
// the vectors first
#include "cpu/vector_simd.h"

namespace gemmart::cpu {

void fill_vector_avx2(Kernels& k) { fill_vector(k); }

}  // namespace gemmart::cpu
