#include "prepared.h"

#include <atomic>
#include <mutex>

namespace dynops::cpu {
namespace {

// 0, 1, ... of at least `rows` numbers. They stay where they are: a longer list is another one.
const int32_t* first_numbers(int64_t rows) {
  static std::atomic<const std::vector<int32_t>*> longest{new std::vector<int32_t>(ascending(1 << 12))};
  const std::vector<int32_t>* found = longest.load();
  if (int64_t(found->size()) >= rows) return found->data();
  static std::mutex mutex;
  const std::lock_guard<std::mutex> guard(mutex);
  found = longest.load();
  if (int64_t(found->size()) < rows) {
    found = new std::vector<int32_t>(ascending(round_up(2 * rows, 1 << 12)));
    longest.store(found);
  }
  return found->data();
}

}  // namespace

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
      .index = pointwise_ ? first_numbers(call.rows) : checked_index(call.index, call.rows, g.out_pixels()),
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
