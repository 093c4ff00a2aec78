// The kernels for AVX2 with FMA and F16C.
#define DYNOPS_ISA avx2
#define DYNOPS_ISA_TARGET "avx2,fma,f16c"
#define DYNOPS_ISA_AVX2
#include "x86.inc.h"
