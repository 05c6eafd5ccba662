// Matrix products with AVX2.
#include "cpu/matmul_avx2.h"

namespace gemmart::cpu {

void fill_matmul_avx2(Kernels& k) { k.matmul = matmul_x86<Avx2, ManyColumns>; }

}  // namespace gemmart::cpu
