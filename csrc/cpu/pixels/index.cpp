// Plan building on the CPU: mask to index, its inverse, the pixels that outputs read.
#include <algorithm>

#include "../engine/mask.h"
#include "../engine/operands.h"

namespace dynops::cpu {
Tensor mask_to_index(const Tensor& mask_in) {
  const Tensor mask = torch::stable::contiguous(mask_in);
  const int64_t n = mask.numel();
  return visit_mask(mask, [&](auto data, auto bits, auto largest) {
    const Count count = count_active(data, bits, largest, n);
    STD_TORCH_CHECK(!count.nan, "mask: expected numbers, got NaN");
    Tensor index = empty({count.active}, ScalarType::Int);
    write_index(data, bits, n, data_of<int32_t>(index), count.active);
    return index;
  });
}

namespace {

std::tuple<Tensor, Tensor> mask_to_index_capacity(const Tensor& mask_in, int64_t capacity) {
  const Tensor mask = torch::stable::contiguous(mask_in);
  Tensor index = empty({capacity}, ScalarType::Int), count = empty({1}, ScalarType::Int);
  int32_t* out = data_of<int32_t>(index);
  visit_mask(mask, [&](auto data, auto bits, auto largest) {
    STD_TORCH_CHECK(!count_active(data, bits, largest, mask.numel()).nan, "mask: expected numbers, got NaN");
    const int64_t used = write_index(data, bits, mask.numel(), out, capacity);
    std::fill(out + used, out + capacity, -1);
    *data_of<int32_t>(count) = int32_t(used);
  });
  return {index, count};
}

Tensor inverse_index(const Tensor& index, const OptionalTensor& count, IntHeaderOnlyArrayRef shape) {
  const int64_t rows = active_rows(index, count);
  Tensor inverse = empty({shape[0], shape[1], shape[2]}, ScalarType::Int);
  const int32_t* in = checked_index(index, rows, inverse.numel());
  int32_t* out = data_of<int32_t>(inverse);
  std::fill(out, out + inverse.numel(), -1);
  for (int64_t i = 0; i < rows; ++i) out[in[i]] = int32_t(i);
  return inverse;
}

Tensor needed_mask(const Tensor& index, const OptionalTensor& count, IntHeaderOnlyArrayRef geometry) {
  const Geometry g = geometry_of(geometry);
  const int64_t rows = active_rows(index, count);
  Tensor mask = empty({g.batch, g.in_h, g.in_w}, ScalarType::Bool);
  uint8_t* out = data_of<uint8_t>(mask);
  std::fill(out, out + g.in_pixels(), uint8_t(0));
  const int32_t* in = checked_index(index, rows, g.out_pixels());
  for (int64_t i = 0; i < rows; ++i) {
    const Pixel p = g.out_pixel(in[i]);
    for (int32_t r = 0; r < g.kernel_h; ++r) {
      for (int32_t s = 0; s < g.kernel_w; ++s) {
        const int32_t q = g.in_pixel(p, r, s);
        if (q >= 0) out[q] = 1;
      }
    }
  }
  return mask;
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("mask_to_index", TORCH_BOX(&dynops::cpu::mask_to_index));
  m.impl("mask_to_index_capacity", TORCH_BOX(&dynops::cpu::mask_to_index_capacity));
  m.impl("inverse_index", TORCH_BOX(&dynops::cpu::inverse_index));
  m.impl("needed_mask", TORCH_BOX(&dynops::cpu::needed_mask));
}
