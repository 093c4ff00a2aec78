// The active elements of a mask on the CPU.
#pragma once

#include "../../common/mask.h"

namespace dynops::cpu {

struct Count {
  int64_t active;
  bool nan;
};

// The nonzeros of n elements, and whether one is NaN.
template <class T>
Count count_active(const T* mask, T value_bits, T largest, int64_t n) {
  int64_t active = 0;
  T worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T value = mask[i] & value_bits;
    active += value != 0;
    worst = value > worst ? value : worst;
  }
  return {active, worst > largest};
}

// Writes up to `capacity` positions of nonzeros, without a branch an element; returns how many.
template <class T>
int64_t write_index(const T* mask, T value_bits, int64_t n, int32_t* index, int64_t capacity) {
  int64_t used = 0, i = 0;
  for (; i < n && used < capacity; ++i) {
    index[used] = int32_t(i);
    used += (mask[i] & value_bits) != 0;
  }
  return used;
}

// int32 [P]: the ascending flat positions of the nonzeros.
Tensor mask_to_index(const Tensor& mask);

}  // namespace dynops::cpu
