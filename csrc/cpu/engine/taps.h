// The pointer tables of the indirect GEMM: which input rows an output row reads.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../../common/geometry.h"
#include "engine.h"

namespace dynops::cpu {

// A row of zeros for taps outside the input, at least `bytes` long.
class ZeroRow {
 public:
  explicit ZeroRow(int64_t bytes) {
    if (bytes > int64_t(sizeof(shared_))) own_.assign(bytes, 0);
  }
  const char* data() const { return own_.empty() ? shared_ : own_.data(); }

 private:
  static const char shared_[1 << 16];
  std::vector<char> own_;
};

// Output rows that read the same taps. A convolution has one class. A transposed convolution with stride s
// has s*s. A row at phase (y % s, x % s) meets only the taps that land on whole input rows.
struct RowClass {
  std::vector<int32_t> taps;  // tap = r * kernel_w + s
  std::vector<int32_t> rows;  // positions in the index, unless all are in this class
  bool all = false;

  int64_t size(int64_t all_rows) const { return all ? all_rows : int64_t(rows.size()); }
  int32_t row(int64_t i) const { return all ? int32_t(i) : rows[i]; }
};

std::vector<RowClass> row_classes(const Geometry& g, const int32_t* index, int64_t rows);

// The input of a convolution: a channels_last map, or packed rows behind an inverse map.
struct Source {
  const Geometry& g;
  const char* x = nullptr;
  int64_t row_bytes = 0;
  const int32_t* inverse = nullptr;  // [in_pixels] or null
  const char* zero;
  bool merged = false;  // the taps of a kernel row are one run of kernel_w * channels elements

  const char* row(int32_t q) const {
    if (q >= 0 && inverse) q = inverse[q];
    return q < 0 ? zero : x + q * row_bytes;
  }
};

// Writes pointer tables for rows that read `taps`.
class TapTable {
 public:
  TapTable(const Source& source, const std::vector<int32_t>& taps);

  // The pointers of `height` rows with output pixels at[0..height), ascending, to table[segment][height], or
  // `by_row` to table[height][segment]. If taps are merged, a run that crosses the image border is put
  // together in `patches` ([rows][kernel_h] runs).
  void fill(const int32_t* at, int32_t height, const char** table, char* patches, bool by_row) const;

  int64_t patch_bytes() const { return source_.merged ? source_.g.taps() * source_.row_bytes : 0; }

 private:
  void fill_merged(Pixel p, int32_t step, const char** table, char* patches) const;
  void fill_row(Pixel p, int32_t step, const char** table) const;

  const Source& source_;
  const std::vector<int32_t>& taps_;
  std::vector<int64_t> offset_;         // [taps]: from the first tap's input; bytes, or pixels of `inverse`
  Span inner_y_{0, 0}, inner_x_{0, 0};  // outputs whose taps all lie inside the input
};

}  // namespace dynops::cpu
