// Pixel plans on a GPU: mask to index, its inverse, the pixels that outputs read; rows in and out.
//
// Everything runs on the current stream. Only mask_to_index reads back from the device, because its
// result has the size that it reads.
#include <array>
#include <tuple>

#include "../common/mask.h"
#include "launch.h"
#include "needed.cuh"
#include "rows.cuh"
#include "select.cuh"

namespace dynops::cuda {
namespace {

// ------------------------------------------------------------------------------- mask to index

// Calls f with the mask's elements as they are selected from.
template <class F>
auto visit_selection(const Tensor& mask, const F& f) {
  return visit_mask(mask, [&](auto data, auto value, auto largest) {
    return f(Selection<decltype(value)>({data, mask.numel(), value, largest}));
  });
}

// The active elements below and the NaN above, on the host. Waits for the stream. The copy goes to memory
// that is not pinned: allocating pinned memory may be refused while another stream is captured.
uint64_t read_counts(const Launch& launch, const uint64_t* counts, int64_t parts) {
  std::array<uint64_t, kSelectParts> values;
  check(cudaMemcpyAsync(values.data(), counts, size_t(parts) * sizeof(uint64_t), cudaMemcpyDeviceToHost,
                        launch.stream()),
        "count");
  check(cudaStreamSynchronize(launch.stream()), "count");
  uint64_t sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += values[size_t(part)];
  return sum;
}

void check_mask(const Tensor& mask) {
  STD_TORCH_CHECK(mask.numel() <= INT32_MAX, "mask: expected at most 2**31 - 1 pixels, got ", mask.numel());
}

Tensor mask_to_index(const Tensor& given) {
  check_mask(given);
  if (given.numel() == 0) return empty_on(given, {0}, ScalarType::Int);
  const Launch launch(given);
  STD_TORCH_CHECK(!launch.captured(),
                  "mask: a CUDA graph cannot capture a plan of exact size, which the host reads: expected a "
                  "capacity");
  const Tensor mask = torch::stable::contiguous(given);
  return visit_selection(mask, [&](const auto& selection) {
    const Tensor memory = launch.bytes(mask, selection.parts * int64_t(sizeof(uint64_t)));
    auto* counts = static_cast<uint64_t*>(memory.data_ptr());
    count_parts(launch, selection, counts);
    const uint64_t sum = read_counts(launch, counts, selection.parts);
    STD_TORCH_CHECK(sum >> 32 == 0, "mask: expected numbers, got ", sum >> 32, " NaN");
    const Tensor index = empty_on(mask, {int64_t(sum)}, ScalarType::Int);
    if (sum == 0) return index;
    write_compact(launch, selection, counts, int64_t(sum), numbers(index));
    return index;
  });
}

std::tuple<Tensor, Tensor> mask_to_index_capacity(const Tensor& given, int64_t capacity) {
  STD_TORCH_CHECK(capacity >= 0 && capacity <= INT32_MAX, "capacity: expected 0 to 2**31 - 1, got ",
                  capacity);
  check_mask(given);
  const Launch launch(given);
  const Tensor index = empty_on(given, {capacity}, ScalarType::Int);
  const Tensor count = empty_on(given, {1}, ScalarType::Int);
  if (given.numel() == 0 || capacity == 0) {
    launch.fill(index, 0xff);
    launch.zero(count);
    return {index, count};
  }
  const Tensor mask = torch::stable::contiguous(given);
  visit_selection(mask, [&](const auto& selection) {
    const Tensor counts = launch.bytes(mask, selection.parts * int64_t(sizeof(uint64_t)));
    write_capacity(launch, selection, static_cast<uint64_t*>(counts.data_ptr()), capacity, numbers(index),
                   numbers(count));
  });
  return {index, count};
}

// ------------------------------------------------------------------- the inverse, what is needed

void check_index(const Tensor& index) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.dim() == 1 && index.is_contiguous(),
                  "index: expected a contiguous int32 vector, got ", index.dim(), " dimensions");
}

Tensor inverse_index(const Tensor& index, const OptionalTensor&, IntHeaderOnlyArrayRef shape) {
  check_index(index);
  STD_TORCH_CHECK(shape.size() == 3, "shape: expected (N, H, W), got ", shape.size(), " numbers");
  const Launch launch(index);
  const Tensor inverse = empty_on(index, {shape[0], shape[1], shape[2]}, ScalarType::Int);
  launch.fill(inverse, 0xff);  // int32 -1
  const int64_t rows = index.size(0);
  if (rows == 0 || inverse.numel() == 0) return inverse;
  launch("write_inverse", rows, write_inverse, numbers(index), rows, numbers(inverse));
  return inverse;
}

Tensor needed_mask(const Tensor& index, const OptionalTensor&, IntHeaderOnlyArrayRef geometry) {
  check_index(index);
  const Geometry g = geometry_of(geometry);
  STD_TORCH_CHECK(g.in_pixels() <= INT32_MAX, "geometry: expected at most 2**31 - 1 input pixels, got ",
                  g.in_pixels());
  const Launch launch(index);
  const Tensor mask = empty_on(index, {g.batch, g.in_h, g.in_w}, ScalarType::Bool);
  launch.zero(mask);
  const int64_t rows = index.size(0);
  if (rows == 0 || mask.numel() == 0) return mask;
  launch("mark_needed", rows, mark_needed, numbers(index), rows, g, static_cast<uint8_t*>(mask.data_ptr()));
  return mask;
}

// ------------------------------------------------------------------------------- rows in and out

StridedMap map_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected [N, C, H, W], got ", x.dim(), " dimensions");
  const StridedMap map{x.size(0),   x.size(1),   x.size(2),
                       x.size(3),   x.stride(0), x.stride(1),
                       x.stride(2), x.stride(3), int64_t(x.element_size())};
  STD_TORCH_CHECK(map.pixels() <= INT32_MAX, "x: expected at most 2**31 - 1 pixels, got ", map.pixels());
  return map;
}

Tensor gather_rows(const Tensor& x, const Tensor& index, const OptionalTensor&) {
  const StridedMap map = map_of(x);
  check_index(index);
  const Launch launch(x);
  const Tensor out = empty_on(x, {index.size(0), map.channels}, x.scalar_type());
  if (out.numel() == 0) return out;
  if (x.numel() == 0) {  // every index is -1
    launch.zero(out);
    return out;
  }
  gather_pixel_rows(launch, index.size(0), map, x.data_ptr(), numbers(index), out.data_ptr());
  return out;
}

Tensor scatter_rows(const Tensor& given, const Tensor& index, const OptionalTensor&,
                    IntHeaderOnlyArrayRef shape, const OptionalTensor& base) {
  check_index(index);
  STD_TORCH_CHECK(shape.size() == 3, "shape: expected (N, H, W), got ", shape.size(), " numbers");
  STD_TORCH_CHECK(given.dim() == 2 && given.size(0) == index.size(0), "rows: expected [", index.size(0),
                  ", C], got ", given.size(0), " rows");
  const Launch launch(given);
  const int64_t channels = given.size(1), dims[] = {shape[0], channels, shape[1], shape[2]};
  Tensor out =
      torch::stable::empty(IntHeaderOnlyArrayRef(dims, 4), given.scalar_type(), std::nullopt, given.device(),
                           std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  if (base) {
    torch::stable::copy_(out, *base);
  } else {
    launch.zero(out);
  }
  if (given.numel() == 0 || out.numel() == 0) return out;
  const Tensor values = torch::stable::contiguous(given);
  scatter_pixel_rows(launch, values.size(0), shape[0] * shape[1] * shape[2],
                     channels * int64_t(values.element_size()), values.data_ptr(), numbers(index),
                     out.data_ptr());
  return out;
}

}  // namespace
}  // namespace dynops::cuda

STABLE_TORCH_LIBRARY_IMPL(dynops, CUDA, m) {
  m.impl("mask_to_index", TORCH_BOX(&dynops::cuda::mask_to_index));
  m.impl("mask_to_index_capacity", TORCH_BOX(&dynops::cuda::mask_to_index_capacity));
  m.impl("inverse_index", TORCH_BOX(&dynops::cuda::inverse_index));
  m.impl("needed_mask", TORCH_BOX(&dynops::cuda::needed_mask));
  m.impl("gather_rows", TORCH_BOX(&dynops::cuda::gather_rows));
  m.impl("scatter_rows", TORCH_BOX(&dynops::cuda::scatter_rows));
}
