// Walking the active blocks of a plan row by row of its grid.
#pragma once

#include <vector>

#include "../../common/tensors.h"

namespace dynops::cpu {

// The blocks of a plan, which ascend, by the rows of the grid (row n*GH + by).
class GridRows {
 public:
  GridRows(const Tensor& index, const OptionalTensor& count, const BlockGeometry& geometry)
      : g_(geometry), blocks_(active_rows(index, count)), at_(checked_index(index, blocks_, g_.blocks())) {
    starts_.reserve(rows() + 1);
    for (int64_t row = 0, b = 0; row < rows(); ++row) {
      starts_.push_back(b);
      while (b < blocks_ && at_[b] < (row + 1) * g_.grid_w) ++b;
    }
    starts_.push_back(blocks_);
  }

  int64_t rows() const { return g_.batch * g_.grid_h; }
  Span blocks_of(int64_t row) const { return {starts_[row], starts_[row + 1]}; }

  // The lines of an image that row `by` of the grid covers.
  Span lines(int64_t by) const { return clipped(g_.first_h + by * g_.step_h, g_.tile_h, g_.height); }

  // The first column of block b, which is in `row`, and the columns of it that lie in the map.
  int64_t left(int64_t row, int64_t b) const { return g_.first_w + (at_[b] - row * g_.grid_w) * g_.step_w; }
  Span columns(int64_t row, int64_t b) const { return clipped(left(row, b), g_.tile_w, g_.width); }

 private:
  BlockGeometry g_;
  int64_t blocks_;
  const int32_t* at_;
  std::vector<int64_t> starts_;
};

}  // namespace dynops::cpu
