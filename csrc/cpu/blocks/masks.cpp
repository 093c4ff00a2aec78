// Block plans on the CPU: a mask of pixels to one of blocks, and the pixels that blocks cover.
#include "grid.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <type_traits>

#include "../engine/mask.h"
#include "../engine/operands.h"
#include "../engine/parallel.h"

namespace dynops::cpu {
namespace {

constexpr double kMaskBytesPerThread = 512 * 1024;

// -------------------------------------------------------------------------- the mask of blocks

// Three ways to make one number of a block's values: `add` takes a value in, `join` two partial results.

// Any bit that is not a floating zero's sign: threshold 0, which is by far the most common.
template <class Word>
struct AnyBit {
  using Partial = Word;
  Word value_bits;
  Word add(Word partial, Word value) const { return Word(partial | (value & value_bits)); }
  Word join(Word a, Word b) const { return Word(a | b); }
  bool active(Word total) const { return total != 0; }
};

template <class T>
struct Largest {
  using Partial = std::conditional_t<sizeof(T) == 1, int32_t, double>;
  double threshold;
  Partial add(Partial partial, T value) const { return join(partial, magnitude(value)); }
  Partial join(Partial a, Partial b) const { return a < b ? b : a; }
  bool active(Partial total) const { return double(total) > threshold; }
  static Partial magnitude(T value) {
    const Partial wide = Partial(value);
    return wide < 0 ? -wide : wide;
  }
};

template <class T>
struct Mean {
  using Partial = typename Largest<T>::Partial;
  double threshold, area;
  Partial add(Partial partial, T value) const { return partial + Largest<T>::magnitude(value); }
  Partial join(Partial a, Partial b) const { return a + b; }
  bool active(Partial total) const { return double(total) / area > threshold; }
};

// Values by reference would be read again after every store of a byte, which may alias them.
template <class T, class Reduce>
void add_line(const T* __restrict__ line, int64_t width, Reduce reduce,
              typename Reduce::Partial* __restrict__ columns) {
  for (int64_t x = 0; x < width; ++x) columns[x] = reduce.add(columns[x], line[x]);
}

// A row of blocks at a time: first its lines into one, which runs at vector speed, then that line by blocks.
template <class T, class Reduce>
void reduce_blocks(const T* mask, const BlockGeometry& g, Reduce reduce, uint8_t* out) {
  using Partial = typename Reduce::Partial;
  const int64_t rows = g.batch * g.grid_h;
  const int64_t threads = threads_for(double(g.pixels()) * sizeof(T), kMaskBytesPerThread);
  parallel(threads, [&](int64_t t) {
    std::vector<Partial> columns(g.width);
    for (const int64_t row : each(share_of(rows, t, threads))) {
      const Span ys = clipped(g.first_h + row % g.grid_h * g.step_h, g.tile_h, g.height);
      std::fill(columns.begin(), columns.end(), Partial(0));
      for (const int64_t y : each(ys)) {
        add_line(mask + (row / g.grid_h * g.height + y) * g.width, g.width, reduce, columns.data());
      }
      for (int64_t bx = 0; bx < g.grid_w; ++bx) {
        const Span xs = clipped(g.first_w + bx * g.step_w, g.tile_w, g.width);
        Partial total = 0;
        for (const int64_t x : each(xs)) total = reduce.join(total, columns[x]);
        out[row * g.grid_w + bx] = reduce.active(total);
      }
    }
  });
}

Tensor block_mask(const Tensor& mask_in, IntHeaderOnlyArrayRef geometry, bool mean, double threshold) {
  const BlockGeometry g = block_geometry_of(geometry);
  STD_TORCH_CHECK(mask_in.numel() == g.pixels(), "mask: expected ", g.pixels(), " pixels, got ",
                  mask_in.numel());
  const Tensor mask = torch::stable::contiguous(mask_in);
  Tensor blocks = empty({g.batch, g.grid_h, g.grid_w}, ScalarType::Bool);
  uint8_t* out = data_of<uint8_t>(blocks);
  visit_mask(mask, [&](auto words, auto bits, auto largest) {
    using Word = decltype(bits);
    const bool may_be_nan = largest != Word(~Word(0));
    STD_TORCH_CHECK(!may_be_nan || !count_active(words, bits, largest, g.pixels()).nan,
                    "mask: expected numbers, got NaN");
    if (!mean && threshold == 0) reduce_blocks(words, g, AnyBit<Word>{bits}, out);
  });
  if (!mean && threshold == 0) return blocks;
  visit_values<torch::headeronly::Half, torch::headeronly::BFloat16>(mask, "mask", [&](auto values) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    if (mean) {
      reduce_blocks(values, g, Mean<T>{threshold, double(g.tile_h * g.tile_w)}, out);
    } else {
      reduce_blocks(values, g, Largest<T>{threshold}, out);
    }
  });
  return blocks;
}

// -------------------------------------------------------------------- the pixels of the blocks

Tensor block_cover(const Tensor& index, const OptionalTensor& count, IntHeaderOnlyArrayRef geometry) {
  const BlockGeometry g = block_geometry_of(geometry);
  const GridRows grid(index, count, g);
  Tensor mask = empty({g.batch, g.height, g.width}, ScalarType::Bool);
  uint8_t* out = data_of<uint8_t>(mask);
  std::fill(out, out + g.pixels(), uint8_t(0));
  for (int64_t row = 0; row < grid.rows(); ++row) {
    const Span blocks = grid.blocks_of(row), ys = grid.lines(row % g.grid_h);
    for (int64_t y = ys.begin; y < ys.end; ++y) {
      uint8_t* line = out + (row / g.grid_h * g.height + y) * g.width;
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const Span xs = grid.columns(row, b);
        std::memset(line + xs.begin, 1, xs.size());
      }
    }
  }
  return mask;
}

// The pixels of a row of blocks in one line of the map.
int64_t line_pixels(const GridRows& grid, int64_t row) {
  int64_t pixels = 0;
  for (const int64_t b : each(grid.blocks_of(row))) pixels += grid.columns(row, b).size();
  return pixels;
}

// Lists the pixels straight from the blocks where these do not overlap. 400 x 700 pixels, 10 % active in
// blocks of 16 x 16, take 5 us; a mask and its index take 90.
Tensor block_pixels(const Tensor& index, IntHeaderOnlyArrayRef geometry) {
  const BlockGeometry g = block_geometry_of(geometry);
  STD_TORCH_CHECK(g.pixels() <= INT32_MAX, "geometry: expected at most 2**31 - 1 pixels, got ", g.pixels());
  if (g.overlaps()) return mask_to_index(block_cover(index, std::nullopt, geometry));
  const GridRows grid(index, std::nullopt, g);
  int64_t total = 0;
  for (int64_t row = 0; row < grid.rows(); ++row) {
    total += grid.lines(row % g.grid_h).size() * line_pixels(grid, row);
  }
  Tensor pixels = empty({total}, ScalarType::Int);
  int32_t* out = data_of<int32_t>(pixels);
  for (int64_t row = 0; row < grid.rows(); ++row) {
    const Span blocks = grid.blocks_of(row), ys = grid.lines(row % g.grid_h);
    if (blocks.size() == 0 || ys.size() == 0) continue;
    const int32_t* const first = out;
    const int64_t line = (row / g.grid_h * g.height + ys.begin) * g.width;
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      for (const int64_t x : each(grid.columns(row, b))) *out++ = int32_t(line + x);
    }
    // each further line is the one before it, moved down
    const int64_t further = (ys.size() - 1) * (out - first), width = out - first;
    for (int64_t i = 0; i < further; ++i) out[i] = out[i - width] + int32_t(g.width);
    out += further;
  }
  return pixels;
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("block_mask", TORCH_BOX(&dynops::cpu::block_mask));
  m.impl("block_cover", TORCH_BOX(&dynops::cpu::block_cover));
  m.impl("block_pixels", TORCH_BOX(&dynops::cpu::block_pixels));
}
