#include "cuda/gemv_integers.cuh"

namespace gemmart::gpu {

FewKernel few_k_kernel(DType dtype, int n, bool two_terms) { return few_integer_kernel<256>(dtype, n, two_terms); }

}  // namespace gemmart::gpu
