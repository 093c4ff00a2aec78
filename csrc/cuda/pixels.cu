// Pixel plans on a GPU: mask to index, its inverse, the pixels that outputs read; rows in and out.
//
// Everything runs on the current stream. Only mask_to_index reads back from the device, because its
// result has the size that it reads.
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_reduce.cuh>
#include <cub/device/device_select.cuh>
#include <tuple>

#include "launch.h"
#include "mask.cuh"
#include "words.cuh"

namespace dynops::cuda {
namespace {

// ------------------------------------------------------------------------------- mask to index

template <class F>
auto visit_mask(const Tensor& mask, const F& f) {
  const void* data = mask.data_ptr();
  switch (mask.scalar_type()) {
    case ScalarType::Half:
      return f(MaskView<uint16_t>{static_cast<const uint16_t*>(data), 0x7fff, 0x7c00});
    case ScalarType::BFloat16:
      return f(MaskView<uint16_t>{static_cast<const uint16_t*>(data), 0x7fff, 0x7f80});
    case ScalarType::Float:
      return f(MaskView<uint32_t>{static_cast<const uint32_t*>(data), 0x7fffffffu, 0x7f800000u});
    case ScalarType::Double:
      return f(
          MaskView<uint64_t>{static_cast<const uint64_t*>(data), ~uint64_t(0) >> 1, uint64_t(0x7ff) << 52});
    default:
      break;
  }
  switch (mask.element_size()) {
    case 1:
      return f(MaskView<uint8_t>{static_cast<const uint8_t*>(data), 0xff, 0xff});
    case 2:
      return f(MaskView<uint16_t>{static_cast<const uint16_t*>(data), 0xffff, 0xffff});
    case 4:
      return f(MaskView<uint32_t>{static_cast<const uint32_t*>(data), ~uint32_t(0), ~uint32_t(0)});
    default:
      return f(MaskView<uint64_t>{static_cast<const uint64_t*>(data), ~uint64_t(0), ~uint64_t(0)});
  }
}

// The active elements below and the NaN above, on the host.
template <class Word>
uint64_t read_counts(const Launch& launch, const Tensor& mask, const MaskView<Word>& view) {
  const Tensor total = launch.bytes(mask, sizeof(uint64_t));
  auto* out = static_cast<uint64_t*>(total.data_ptr());
  const auto counts =
      thrust::make_transform_iterator(thrust::counting_iterator<int64_t>(0), CountOf<Word>{view});
  with_temporary(launch, mask, "count", [&](void* memory, size_t& bytes) {
    return cub::DeviceReduce::Sum(memory, bytes, counts, out, mask.numel(), launch.stream());
  });
  uint64_t value = 0;
  check(cudaMemcpyAsync(&value, out, sizeof(value), cudaMemcpyDeviceToHost, launch.stream()), "count");
  check(cudaStreamSynchronize(launch.stream()), "count");
  return value;
}

// Writes the positions of the active elements and how many they are.
template <class Word>
void select(const Launch& launch, const Tensor& mask, const MaskView<Word>& view, int32_t* index,
            int32_t* count) {
  with_temporary(launch, mask, "select", [&](void* memory, size_t& bytes) {
    return cub::DeviceSelect::If(memory, bytes, thrust::counting_iterator<int32_t>(0), index, count,
                                 mask.numel(), IsActive<Word>{view}, launch.stream());
  });
}

Tensor mask_to_index(const Tensor& given) {
  if (given.numel() == 0) return empty_on(given, {0}, ScalarType::Int);
  STD_TORCH_CHECK(given.numel() <= INT32_MAX, "mask: expected at most 2**31 - 1 pixels, got ", given.numel());
  const Launch launch(given);
  const Tensor mask = torch::stable::contiguous(given);
  return visit_mask(mask, [&](const auto& view) {
    const uint64_t counts = read_counts(launch, mask, view);
    STD_TORCH_CHECK(counts >> 32 == 0, "mask: expected numbers, got ", counts >> 32, " NaN");
    const Tensor index = empty_on(mask, {int64_t(counts)}, ScalarType::Int);
    if (counts == 0) return index;
    const Tensor count = launch.bytes(mask, sizeof(int32_t));
    select(launch, mask, view, static_cast<int32_t*>(index.data_ptr()),
           static_cast<int32_t*>(count.data_ptr()));
    return index;
  });
}

// index[i] = selected[i] below the count, -1 from there on. The two may be the same memory.
__global__ void fit_capacity(const int32_t* selected, const int32_t* found, int32_t* index, int32_t* count,
                             int64_t capacity) {
  const int64_t valid = *found < capacity ? *found : capacity;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < capacity;
       i += int64_t(gridDim.x) * kThreads) {
    index[i] = i < valid ? selected[i] : -1;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *count = int32_t(valid);
}

std::tuple<Tensor, Tensor> mask_to_index_capacity(const Tensor& given, int64_t capacity) {
  STD_TORCH_CHECK(capacity >= 0 && capacity <= INT32_MAX, "capacity: expected 0 to 2**31 - 1, got ",
                  capacity);
  STD_TORCH_CHECK(given.numel() <= INT32_MAX, "mask: expected at most 2**31 - 1 pixels, got ", given.numel());
  const Launch launch(given);
  const Tensor index = empty_on(given, {capacity}, ScalarType::Int);
  const Tensor count = empty_on(given, {1}, ScalarType::Int);
  if (given.numel() == 0 || capacity == 0) {
    launch.fill(index, 0xff);
    launch.zero(count);
    return {index, count};
  }
  const Tensor mask = torch::stable::contiguous(given);
  const int64_t pixels = mask.numel();
  const Tensor selected = capacity >= pixels ? index : empty_on(mask, {pixels}, ScalarType::Int);
  const Tensor found = empty_on(mask, {1}, ScalarType::Int);
  auto* positions = static_cast<int32_t*>(selected.data_ptr());
  auto* total = static_cast<int32_t*>(found.data_ptr());
  visit_mask(mask, [&](const auto& view) { select(launch, mask, view, positions, total); });
  fit_capacity<<<grid_for(capacity), kThreads, 0, launch.stream()>>>(
      positions, total, static_cast<int32_t*>(index.data_ptr()), static_cast<int32_t*>(count.data_ptr()),
      capacity);
  check_launch("fit_capacity");
  return {index, count};
}

// ------------------------------------------------------------------- the inverse, what is needed

void check_index(const Tensor& index) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.dim() == 1 && index.is_contiguous(),
                  "index: expected a contiguous int32 vector, got ", index.dim(), " dimensions");
}

__global__ void write_inverse(const int32_t* index, int64_t rows, int32_t* inverse) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < rows;
       i += int64_t(gridDim.x) * kThreads) {
    if (index[i] >= 0) inverse[index[i]] = int32_t(i);
  }
}

Tensor inverse_index(const Tensor& index, const OptionalTensor&, IntHeaderOnlyArrayRef shape) {
  check_index(index);
  STD_TORCH_CHECK(shape.size() == 3, "shape: expected (N, H, W), got ", shape.size(), " numbers");
  const Launch launch(index);
  const Tensor inverse = empty_on(index, {shape[0], shape[1], shape[2]}, ScalarType::Int);
  launch.fill(inverse, 0xff);  // int32 -1
  const int64_t rows = index.size(0);
  if (rows == 0 || inverse.numel() == 0) return inverse;
  write_inverse<<<grid_for(rows), kThreads, 0, launch.stream()>>>(
      static_cast<const int32_t*>(index.data_ptr()), rows, static_cast<int32_t*>(inverse.data_ptr()));
  check_launch("write_inverse");
  return inverse;
}

// One thread for each output pixel and tap; all that write a pixel write the same value.
__global__ void mark_needed(const int32_t* index, int64_t rows, Geometry g, uint8_t* mask) {
  const int64_t taps = g.taps();
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < rows * taps;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / taps;
    const int32_t tap = int32_t(i - row * taps), r = tap / int32_t(g.kernel_w);
    if (index[row] < 0) continue;
    const Pixel p = pixel_at(index[row], int32_t(g.out_h), int32_t(g.out_w));
    const int32_t q = input_pixel(g, p, r, tap - r * int32_t(g.kernel_w));
    if (q >= 0) mask[q] = 1;
  }
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
  mark_needed<<<grid_for(rows * g.taps()), kThreads, 0, launch.stream()>>>(
      static_cast<const int32_t*>(index.data_ptr()), rows, g, static_cast<uint8_t*>(mask.data_ptr()));
  check_launch("mark_needed");
  return mask;
}

// ------------------------------------------------------------------------------- rows in and out

// The threads of a block as rows by words: the row of this thread, and its first word.
struct RowBlock {
  dim3 threads;
  int blocks;

  RowBlock(int64_t rows, int64_t words) {
    unsigned across = 1;
    while (across < 32 && across < words) across *= 2;
    threads = dim3(across, kThreads / across);
    blocks = grid_for(rows, threads.y);
  }
};

// out[i] = x[index[i]] or zero; rows of `words` words.
template <class Word>
__global__ void gather(const Word* x, const int32_t* index, int64_t rows, int64_t words, Word* out) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; i < rows;
       i += int64_t(gridDim.x) * blockDim.y) {
    const int64_t pixel = index[i];
    for (int64_t w = threadIdx.x; w < words; w += blockDim.x) {
      out[i * words + w] = pixel < 0 ? Word{} : x[pixel * words + w];
    }
  }
}

// The same from a map of any strides, element by element.
template <class Word>
__global__ void gather_strided(const Word* x, const int32_t* index, int64_t rows, int64_t channels, int32_t h,
                               int32_t w, int64_t stride_n, int64_t stride_c, int64_t stride_h,
                               int64_t stride_w, Word* out) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; i < rows;
       i += int64_t(gridDim.x) * blockDim.y) {
    const int32_t pixel = index[i];
    const Pixel p = pixel_at(pixel < 0 ? 0 : pixel, h, w);
    const Word* at = x + p.n * stride_n + p.y * stride_h + p.x * stride_w;
    for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
      out[i * channels + c] = pixel < 0 ? Word{} : at[c * stride_c];
    }
  }
}

// out[index[i]] = rows[i].
template <class Word>
__global__ void scatter(const Word* values, const int32_t* index, int64_t rows, int64_t words, Word* out) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; i < rows;
       i += int64_t(gridDim.x) * blockDim.y) {
    const int64_t pixel = index[i];
    if (pixel < 0) continue;
    for (int64_t w = threadIdx.x; w < words; w += blockDim.x) out[pixel * words + w] = values[i * words + w];
  }
}

bool is_channels_last(const Tensor& x) {  // pixel after pixel, channels together
  return x.stride(1) == 1 && x.stride(3) == x.size(1) && x.stride(2) == x.size(3) * x.stride(3) &&
         x.stride(0) == x.size(2) * x.stride(2);
}

void check_map(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected [N, C, H, W], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.size(0) * x.size(2) * x.size(3) <= INT32_MAX, "x: expected at most 2**31 - 1 pixels");
}

Tensor gather_rows(const Tensor& x, const Tensor& index, const OptionalTensor&) {
  check_map(x);
  check_index(index);
  const Launch launch(x);
  const int64_t rows = index.size(0), channels = x.size(1), size = int64_t(x.element_size());
  const Tensor out = empty_on(x, {rows, channels}, x.scalar_type());
  if (out.numel() == 0) return out;
  if (x.numel() == 0) {  // every index is -1
    launch.zero(out);
    return out;
  }
  const auto* in = static_cast<const int32_t*>(index.data_ptr());
  const bool whole_rows = is_channels_last(x);
  const uint64_t addresses = address(x.data_ptr()) | address(out.data_ptr());
  visit_word(addresses | uint64_t(whole_rows ? channels * size : size), [&](auto* null) {
    using Word = std::remove_pointer_t<decltype(null)>;
    const auto* from = static_cast<const Word*>(x.data_ptr());
    auto* to = static_cast<Word*>(out.data_ptr());
    const int64_t words = channels * size / int64_t(sizeof(Word));
    const RowBlock block(rows, words);
    if (whole_rows) {
      gather<<<block.blocks, block.threads, 0, launch.stream()>>>(from, in, rows, words, to);
    } else {
      gather_strided<<<block.blocks, block.threads, 0, launch.stream()>>>(
          from, in, rows, channels, int32_t(x.size(2)), int32_t(x.size(3)), x.stride(0), x.stride(1),
          x.stride(2), x.stride(3), to);
    }
  });
  check_launch("gather");
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
  const int64_t rows = values.size(0), bytes = channels * int64_t(values.element_size());
  const auto* in = static_cast<const int32_t*>(index.data_ptr());
  visit_word(uint64_t(bytes) | address(values.data_ptr()) | address(out.data_ptr()), [&](auto* null) {
    using Word = std::remove_pointer_t<decltype(null)>;
    const int64_t words = bytes / int64_t(sizeof(Word));
    const RowBlock block(rows, words);
    scatter<<<block.blocks, block.threads, 0, launch.stream()>>>(
        static_cast<const Word*>(values.data_ptr()), in, rows, words, static_cast<Word*>(out.data_ptr()));
  });
  check_launch("scatter");
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
