// The kernels of one instruction set: included by isa_<name>.cpp, inside its namespace and after its
// target pragma, with DYNOPS_ISA_* defined. Everything here is compiled once for each.

#define FORCE_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#include "vec.inc.h"

// Vectors in a full panel: two where there are 32 registers, one where there are 16.
#if defined(DYNOPS_ISA_AVX512)
constexpr int kPanelVectors = 2;
#else
constexpr int kPanelVectors = 1;
#endif
// A wider panel has fewer rows in its tiles, and so fewer loads for a product: 6 x 4 takes 10 for 24, 12 x 2
// takes 14.
#if defined(DYNOPS_ISA_AVX512)
constexpr int kWideVectors = 4;
#else
constexpr int kWideVectors = kPanelVectors;
#endif
constexpr int kPanelWidth = kPanelVectors * Vec::kLanes;

// The sums of a tile so far, in the L1 cache: of parts of a reduction that is longer than kSumLength.
template <int MR, int NV>
struct KeptSums {
  alignas(64) float sums[MR][NV][Vec::kLanes];  // else every access spans two lines: 2 % of the time
  bool empty = true;

  __attribute__((always_inline)) KeptSums() {
    asm("" : "=m"(sums));  // nothing reads them while they are empty, which GCC does not see
  }
  // Takes what `acc` holds, and clears it.
  __attribute__((always_inline)) void take(Vec (&acc)[MR][NV]) {
    if (!empty) add_to(acc);
    empty = false;
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int v = 0; v < NV; ++v) {
        store(sums[i][v], acc[i][v]);
        acc[i][v] = zero();
      }
    }
  }
  __attribute__((always_inline)) void add_to(Vec (&acc)[MR][NV]) const {
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = add(acc[i][v], load(sums[i][v]));
    }
  }
};

template <Dtype kIn>
FORCE_INLINE Vec load_as(const char* p) {
  if constexpr (kIn == Dtype::kFloat32) return load((const float*)p);
  if constexpr (kIn == Dtype::kBFloat16) return load_bf16(p);
  if constexpr (kIn == Dtype::kInt8) return load_i8(p);
  return load_f16(p);
}

// The first n lanes, zero in the others.
template <Dtype kIn>
FORCE_INLINE Vec load_as(const char* p, int n) {
  if constexpr (kIn == Dtype::kFloat32) return load((const float*)p, n);
  if constexpr (kIn == Dtype::kBFloat16) return load_bf16(p, n);
  if constexpr (kIn == Dtype::kInt8) return load_i8(p, n);
  return load_f16(p, n);
}

template <Dtype kOut>
FORCE_INLINE void store_as(char* p, Vec a) {
  if constexpr (kOut == Dtype::kFloat32) return store((float*)p, a);
  if constexpr (kOut == Dtype::kBFloat16) return store_bf16(p, a);
  store_f16(p, a);
}

FORCE_INLINE int left_of(int64_t end, int64_t c) {
  return int(end - c < Vec::kLanes ? end - c : Vec::kLanes);
}

// Plain vector stores: libc's memset turns to `rep stosb` at 2 KB, and then runs at 30 GB/s, not 160. The
// last vector may lie over the one before it.
static void fill(char* to, const char* from, int64_t bytes, bool stream) {
  constexpr int64_t kVector = Vec::kLanes * 4;
  const int64_t last = bytes - kVector;
  if (last < 0) {
    from ? __builtin_memcpy(to, from, size_t(bytes)) : __builtin_memset(to, 0, size_t(bytes));
    return;
  }
  int64_t i = 0;
  if (from) {
    for (; i < last; i += kVector) store((float*)(to + i), load((const float*)(from + i)));
    store((float*)(to + last), load((const float*)(from + last)));
    return;
  }
#if defined(DYNOPS_ISA_AVX512)
  if (stream && (uintptr_t)to % kVector == 0) {
    for (; i <= last; i += kVector) _mm512_stream_ps((float*)(to + i), zero().v);
    if (i == bytes) return;
  }
#endif
  (void)stream;
  for (; i < last; i += kVector) store((float*)(to + i), zero());
  store((float*)(to + last), zero());
}

#include "channels.inc.h"
#include "depthwise.inc.h"
#include "dots.inc.h"
#include "experts.inc.h"
#include "gemm.inc.h"
#include "glu.inc.h"
#include "outer_product.inc.h"
#include "packing.inc.h"
#include "planes.inc.h"

extern const Kernels table;
const Kernels table = {DYNOPS_ISA_NAME,
                       kPanelWidth,
                       Vec::kLanes,
                       kWideVectors,
#if defined(DYNOPS_ISA_BF16)
                       true,
#else
                       false,
#endif
                       fill,
                       compress,
                       expand,
                       expand_add,
                       pick_panel,
                       gemm,
                       winograd_input,
                       winograd_output,
                       depthwise,
                       depthwise_pairs,
                       depthwise_weight_grad,
                       outer_product,
                       gather_columns,
                       dots,
                       local_filter,
                       to_float,
                       from_float,
                       add_to,
                       pack_columns,
                       pack_winograd,
                       pack_pairs,
                       mix,
                       glu,
                       glu_grad,
                       pack_rows,
                       row_dots,
                       finish_rows,
                       gather_planes,
                       spread_planes,
                       plane_strip,
                       split_pairs};
