// Attention with AVX-512 and VNNI.
#include "cpu/attention_avx512.h"

namespace gemmart::cpu {

void fill_attention_avx512vnni(Kernels& k) { fill_attention<ByteProducts>(k); }

}  // namespace gemmart::cpu
