// Which input rows an output row reads: the pointer tables of the indirect GEMM.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/geometry.h"
#include "engine.h"

namespace dynops::cpu {

// A row of zeros for taps outside the input, at least `bytes` long.
class ZeroRow {
 public:
  explicit ZeroRow(int64_t bytes) {
    if (bytes > int64_t(sizeof(shared_))) own_.assign(size_t(bytes), 0);
  }
  const char* data() const { return own_.empty() ? shared_ : own_.data(); }

 private:
  static const char shared_[1 << 16];
  std::vector<char> own_;
};

// Output rows that read the same taps. A convolution has one class. A transposed convolution with
// stride s has s*s: a row at phase (y % s, x % s) meets only the taps that land on whole input rows.
struct RowClass {
  std::vector<int32_t> taps;  // tap = r * kernel_w + s
  std::vector<int32_t> rows;  // positions in the index; empty in the class of all rows
};

std::vector<RowClass> row_classes(const Geometry& g, const int32_t* index, int64_t rows);

// The input of a convolution: a channels_last map, or packed rows behind an inverse map.
struct Source {
  const Geometry& g;
  const char* x;
  int64_t row_bytes;
  const int32_t* inverse;  // [in_pixels] or null
  const char* zero;
  bool merged;  // the taps of a kernel row are one run of kernel_w * channels elements

  const char* row(int32_t q) const {
    if (q >= 0 && inverse) q = inverse[q];
    return q < 0 ? zero : x + q * row_bytes;
  }
};

// Writes the pointers of `height` rows with output pixels at[0..height) to table[segment][height].
// Where taps are merged and a run crosses the image border, it is put together in `patches`
// ([rows][kernel_h] runs).
void fill_tile(const Source& source, const RowClass& rows, const int32_t* at, int32_t height,
               const char** table, char* patches);

}  // namespace dynops::cpu
