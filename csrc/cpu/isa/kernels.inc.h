// The kernels of one instruction set: included by <name>.cpp, inside its namespace and after its target
// pragma, with DYNOPS_ISA_* defined. Everything here is compiled once for each.

#define FORCE_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#include "vec.inc.h"

#include "activations.inc.h"

// Vectors in a full panel: two where there are 32 registers, one where there are 16. A wider panel has fewer
// rows in its tiles, and so fewer loads for a product. 6 x 4 takes 10 for 24, 12 x 2 takes 14.
#if defined(DYNOPS_ISA_AVX512)
constexpr int kPanelVectors = 2, kWideVectors = 4;
#else
constexpr int kPanelVectors = 1, kWideVectors = 1;
#endif
#if defined(DYNOPS_ISA_BF16)
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
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

// A dtype as a type, for f(type) where the kernel is compiled for each; type.value is the dtype.
template <Dtype kType>
struct DtypeConstant {
  static constexpr Dtype value = kType;
};

template <class F>
FORCE_INLINE void with_float_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat32) return f(DtypeConstant<Dtype::kFloat32>());
  if (dtype == Dtype::kBFloat16) return f(DtypeConstant<Dtype::kBFloat16>());
  f(DtypeConstant<Dtype::kFloat16>());
}

template <class F>
FORCE_INLINE void with_any_type(Dtype dtype, const F& f) {
  dtype == Dtype::kInt8 ? f(DtypeConstant<Dtype::kInt8>()) : with_float_type(dtype, f);
}

// [i] is function.operator()<i + 1>(): a kernel for each height of a tile.
template <class F, int... kIndex>
constexpr auto by_height_of(const F& function, std::integer_sequence<int, kIndex...>) {
  return std::array{function.template operator()<kIndex + 1>()...};
}
template <int kMost, class F>
constexpr auto by_height(const F& function) {
  return by_height_of(function, std::make_integer_sequence<int, kMost>());
}

template <Dtype kOut>
FORCE_INLINE void store_as(char* p, Vec a) {
  if constexpr (kOut == Dtype::kFloat32) return store((float*)p, a);
  if constexpr (kOut == Dtype::kBFloat16) return store_bf16(p, a);
  store_f16(p, a);
}

// n floats, at most a vector of them.
FORCE_INLINE Vec load_floats(const float* p, int n) { return n == Vec::kLanes ? load(p) : load(p, n); }
FORCE_INLINE void store_floats(float* p, Vec a, int n) { n == Vec::kLanes ? store(p, a) : store(p, a, n); }

FORCE_INLINE int left_of(int64_t end, int64_t c) {
  return int(end - c < Vec::kLanes ? end - c : Vec::kLanes);
}

// Finishes one vector of a row: activation(gate * (scale * acc + shift) + residual).
template <class Product>
FORCE_INLINE void finish(const Product& p, Vec acc, Vec scale, Vec shift, const RowBlock& rows, int row,
                         int64_t byte, int n) {
  Vec y = fma(acc, scale, shift);
  if (rows.gate) y = mul(y, broadcast(rows.gate[row]));
  if (rows.residual) y = add(y, load(rows.residual[row] + byte, p.out, n));
  store(rows.out[row] + byte, activate(y, p.activation), p.out, n);
}

// Plain vector stores: libc's memset turns to `rep stosb` at 2 KB, and then runs at 30 GB/s, not 160. The
// last vector may lie over the one before it.
static void fill(char* to, const char* from, int64_t bytes, bool stream) {
  constexpr int64_t kVector = Vec::kLanes * 4;
  const int64_t last = bytes - kVector;
  if (last < 0) {
    from ? __builtin_memcpy(to, from, bytes) : __builtin_memset(to, 0, bytes);
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
#include "outer_product.inc.h"
#include "packing.inc.h"
#include "planes.inc.h"

extern const Kernels table;
const Kernels table = {.name = DYNOPS_ISA_NAME,
                       .panel_width = kPanelWidth,
                       .lanes = Vec::kLanes,
                       .wide_vectors = kWideVectors,
                       .bf16_dot = kBf16Dot,
                       .fill = fill,
                       .compress = compress,
                       .expand = expand,
                       .expand_add = expand_add,
                       .pick_panel = pick_panel,
                       .gemm = gemm,
                       .winograd_input = winograd_input,
                       .winograd_output = winograd_output,
                       .depthwise = depthwise,
                       .depthwise_pairs = depthwise_pairs,
                       .depthwise_weight_grad = depthwise_weight_grad,
                       .outer_product = outer_product,
                       .gather_columns = gather_columns,
                       .dots = dots,
                       .local_filter = local_filter,
                       .to_float = to_float,
                       .from_float = from_float,
                       .add_to = add_to,
                       .pack_columns = pack_columns,
                       .pack_winograd = pack_winograd,
                       .pack_pairs = pack_pairs,
                       .mix = mix,
                       .glu = glu,
                       .glu_grad = glu_grad,
                       .pack_rows = pack_rows,
                       .row_dots = row_dots,
                       .finish_rows = finish_rows,
                       .gather_planes = gather_planes,
                       .spread_planes = spread_planes,
                       .plane_strip = plane_strip,
                       .split_pairs = split_pairs};
