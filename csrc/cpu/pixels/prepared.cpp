#include "prepared.h"

namespace dynops::cpu {

void PreparedConv::run(const Call& call) const {
  const Geometry g =
      pointwise_ ? Geometry{1, 1, call.rows, 1, call.rows, 1, 1, 1, 1, 0, 0, 1, 1, g_.groups, 0} : g_;
  const int64_t row_bytes = in_channels_ * size_of(dtype_);
  const ZeroRow zero(row_bytes);
  const Forward f{
      .g = g,
      .in_channels = in_channels_,
      .out_channels = out_channels_,
      .rows = call.rows,
      .dtype = dtype_,
      .index = checked_index(call.index, call.rows, g.out_pixels()),
      .source = {.g = g, .x = call.x, .row_bytes = row_bytes, .inverse = call.source, .zero = zero.data()},
      .affine = affine_,
      .activation = activation_,
      .weight = weight_,
      .residual = call.residual,
      .out = call.out,
      .packed_out = true};
  call.quads ? run_winograd(f, call.quads, call.tiles) : run_forward(f);
}

}  // namespace dynops::cpu
