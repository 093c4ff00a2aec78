// Division by a number that is known before a kernel starts.
#pragma once

#include <cstdint>

#include "geometry.h"

namespace dynops {

template <class Int>
struct Divided {
  Int quotient, remainder;
};

// n / value for n >= 0. A divisor of 0 stands for an empty axis, which nothing is divided by.
template <class Int>
struct Divisor {
  Int value;

  Divisor(int64_t value) : value(Int(value)) {}
  DYNOPS_HD Divided<Int> divide(Int n) const {
    const Int quotient = n / value;
    return {quotient, n - quotient * value};
  }
};

// Divides by a multiplication and a shift (Granlund and Montgomery, PLDI 1994). A GPU divides in about 20
// instructions, and a copied word would need five to seven divisions.
template <>
struct Divisor<int32_t> {
  int32_t value;
  uint32_t shift, factor;

  Divisor(int64_t given) : value(int32_t(given)), shift(0), factor(1) {
    if (given <= 0) return;
    while ((int64_t(1) << shift) < given) ++shift;
    factor =
        uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - uint64_t(given))) / uint64_t(given) + 1);
  }
  DYNOPS_HD Divided<int32_t> divide(int32_t n) const {
    const uint32_t high = uint32_t((uint64_t(uint32_t(n)) * factor) >> 32);
    const int32_t quotient = int32_t((high + uint32_t(n)) >> shift);
    return {quotient, n - quotient * value};
  }
};

}  // namespace dynops
