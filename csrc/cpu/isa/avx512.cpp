// The kernels for AVX-512 (F, BW, DQ, VL).
#define DYNOPS_ISA avx512
#define DYNOPS_ISA_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define DYNOPS_ISA_AVX512
#include "x86.inc.h"
