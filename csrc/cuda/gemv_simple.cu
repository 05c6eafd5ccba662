#include "cuda/gemv_integers.cuh"

namespace gemmart::gpu {

FewKernel few_simple_kernel(DType dtype, int n, bool two_terms) { return few_integer_kernel<32>(dtype, n, two_terms); }

}  // namespace gemmart::gpu
