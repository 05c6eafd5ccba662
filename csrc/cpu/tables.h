// The functions by which each kernel file puts what it does better into the table.
#pragma once

#include "cpu/kernels.h"

namespace gemmart::cpu {

void fill_matmul_scalar(Kernels& k);
void fill_vector_scalar(Kernels& k);
void fill_attention_scalar(Kernels& k);
void fill_peak_scalar(Kernels& k);
void fill_matmul_avx2(Kernels& k);
void fill_vector_avx2(Kernels& k);
void fill_attention_avx2(Kernels& k);
void fill_peak_avx2(Kernels& k);
void fill_matmul_avxvnni(Kernels& k);
void fill_peak_avxvnni(Kernels& k);
void fill_matmul_avx512vnni(Kernels& k);
void fill_vector_avx512vnni(Kernels& k);
void fill_attention_avx512vnni(Kernels& k);
void fill_matmul_amx(Kernels& k);
void fill_peak_avx512vnni(Kernels& k);

}  // namespace gemmart::cpu
