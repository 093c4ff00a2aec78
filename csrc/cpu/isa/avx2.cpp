// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>
#include "../engine/engine.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define DYNOPS_ISA_AVX2
#define DYNOPS_ISA_NAME "avx2"
namespace dynops::cpu::avx2 {
#include "kernels.inc.h"
}  // namespace dynops::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
