// Element-wise kernels with AVX-512.
#include "cpu/simd_avx512.h"
// the vectors first
#include "cpu/vector_simd.h"

namespace gemmart::cpu {

void fill_vector_avx512vnni(Kernels& k) { fill_vector(k); }

}  // namespace gemmart::cpu
