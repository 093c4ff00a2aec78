// The kernels compiled for DYNOPS_ISA_TARGET, as dynops::cpu::DYNOPS_ISA. Included once by each x86 file of
// this folder. Its headers come before the target pragma: nothing of theirs may need these instructions.
#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../engine/engine.h"

#define DYNOPS_TEXT_(x) #x
#define DYNOPS_TEXT(x) DYNOPS_TEXT_(x)
#define DYNOPS_PRAGMA_(x) _Pragma(#x)
#define DYNOPS_PRAGMA(x) DYNOPS_PRAGMA_(x)
#define DYNOPS_ISA_NAME DYNOPS_TEXT(DYNOPS_ISA)

// GCC reports its own _mm512_undefined_ps() as uninitialised (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#if defined(__clang__)
DYNOPS_PRAGMA(clang attribute push(__attribute__((target(DYNOPS_ISA_TARGET))), apply_to = function))
#else
#pragma GCC push_options
DYNOPS_PRAGMA(GCC target(DYNOPS_ISA_TARGET))
#endif

namespace dynops::cpu::DYNOPS_ISA {
#include "kernels.inc.h"
}  // namespace dynops::cpu::DYNOPS_ISA

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
