// Sums of gradient rows, of which the gradient of a bias is made.
#pragma once

#include <algorithm>
#include <vector>

#include "engine.h"

namespace dynops::cpu {

// Rows summed in float32 before float64 takes over. Sums of 16 were 3 times as far from the exact ones as
// their last rounding. That is past the error budget where the dense layer's sums are exact to that rounding.
// Sums of 4 add half of it.
inline constexpr int64_t kSumRows = 4;

// to[c] += the sum of the rows that are added, in their order; whole when this object ends.
class RowSums {
 public:
  RowSums(int64_t columns, double* to) : to_(to), few_(columns, 0.f) {}
  ~RowSums() { flush(); }
  RowSums(const RowSums&) = delete;
  RowSums& operator=(const RowSums&) = delete;

  void add(const char* row, Dtype dtype) {
    kernels().add_to(row, dtype, int64_t(few_.size()), few_.data());
    if (++rows_ == kSumRows) flush();
  }

 private:
  void flush() {
    if (rows_ == 0) return;
    for (size_t c = 0; c < few_.size(); ++c) to_[c] += double(few_[c]);
    std::fill(few_.begin(), few_.end(), 0.f);
    rows_ = 0;
  }

  double* to_;
  std::vector<float> few_;
  int64_t rows_ = 0;
};

// The sums of all columns in a tensor's dtype, rounded to float32 on the way.
inline void round_sums(const std::vector<double>& sums, Dtype dtype, char* to) {
  const std::vector<float> rounded(sums.begin(), sums.end());
  kernels().from_float(rounded.data(), int64_t(rounded.size()), dtype, to);
}

}  // namespace dynops::cpu
