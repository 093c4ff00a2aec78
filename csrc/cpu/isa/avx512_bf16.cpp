// The kernels for AVX-512 with its bfloat16 dot product (Zen 4 and later, Cooper Lake, Sapphire Rapids).
#define DYNOPS_ISA avx512_bf16
#define DYNOPS_ISA_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#define DYNOPS_ISA_AVX512
#define DYNOPS_ISA_BF16
#include "x86.inc.h"
