// Matrix products with AVX-512 VNNI.
#include "cpu/matmul_avx512.h"

namespace gemmart::cpu {

void fill_matmul_avx512vnni(Kernels& k) { k.matmul = matmul_x86<Avx512, ManyColumns>; }

}  // namespace gemmart::cpu
