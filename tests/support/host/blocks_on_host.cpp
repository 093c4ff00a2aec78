// csrc/cuda/blocks.cuh compiled for a CPU. Built and called by test_cuda_on_host.py.
#include "block_of_threads.h"

#include <type_traits>

#include "../../../csrc/cuda/blocks.cuh"

namespace {

using namespace dynops;
using namespace dynops::cuda;

host::Threads with_limit(int64_t limit) { return {false, limit}; }

}  // namespace

extern "C" {

void gather(int64_t limit, const BlockGeometry* g, const Lines* lines, int64_t tiles, const void* map,
            const int32_t* index, void* out) {
  gather_tiles(with_limit(limit), *g, *lines, tiles, map, index, out);
}

void replace(int64_t limit, const BlockGeometry* g, const Lines* lines, int64_t tiles, const void* values,
             const int32_t* inverse, const void* base, void* out) {
  replace_tiles(with_limit(limit), *g, *lines, tiles, values, inverse, base, out);
}

#define ADD(name, T)                                                                                      \
  void name(int64_t limit, const BlockGeometry* g, const Lines* lines, int64_t tiles, const void* values, \
            const int32_t* inverse, const void* base, void* out) {                                        \
    add_tiles<T>(with_limit(limit), *g, *lines, tiles, values, inverse, base, out);                       \
  }
ADD(add_float32, float)
ADD(add_float16, __half)
ADD(add_bfloat16, __nv_bfloat16)

void cover(int64_t limit, const BlockGeometry* g, int64_t tiles, const int32_t* index, bool* mask) {
  mark_blocks(with_limit(limit), *g, tiles, index, mask);
}

#define MASK(name, T)                                                                                  \
  void name(int64_t limit, const BlockGeometry* g, const void* mask, int mean, double threshold,       \
            bool* active) {                                                                            \
    mask_blocks<32>(with_limit(limit), *g, static_cast<const T*>(mask), mean != 0, threshold, active); \
  }
MASK(mask_bool, uint8_t)
MASK(mask_int16, int16_t)
MASK(mask_int64, int64_t)
MASK(mask_bfloat16, __nv_bfloat16)
MASK(mask_float32, float)
MASK(mask_float64, double)

// The first of `n` numbers whose division goes wrong, or -1.
int64_t wrong_division(const int32_t* numbers, int64_t n, const int32_t* divisors, int64_t m) {
  for (int64_t k = 0; k < m; ++k) {
    const Divisor<int32_t> divisor(divisors[k]);
    for (int64_t i = 0; i < n; ++i) {
      const auto [quotient, remainder] = divisor.divide(numbers[i]);
      if (quotient != numbers[i] / divisors[k] || remainder != numbers[i] % divisors[k]) return i;
    }
  }
  return -1;
}
}
