// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>
#include "../engine/engine.h"

#include <immintrin.h>

// GCC reports its own _mm512_undefined_ps() as uninitialised (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define DYNOPS_ISA_AVX512
#define DYNOPS_ISA_NAME "avx512"
namespace dynops::cpu::avx512 {
#include "kernels.inc.h"
}  // namespace dynops::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
