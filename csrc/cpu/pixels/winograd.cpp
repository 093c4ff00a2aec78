// Winograd convolution where active pixels lie side by side: 2 x 2 outputs from 16 products instead of 36.
//
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (CVPR 2016). The 4 x 4 inputs of a tile
// of outputs are transformed, to [16][tile][channel]. 16 products with the transformed weight follow, on the
// same GEMM as all else. Their results are brought back to four outputs, finished, and written to the rows
// that are active.
#include "../engine/winograd_pass.h"
#include "conv.h"

namespace dynops::cpu {
namespace {

// A tile takes 16 products, and the transforms' time on top; direct convolution takes 9 a pixel. With all
// four pixels active a tile is 1.45 (64 channels) to 1.8 times as fast (128 and more).
constexpr double kPixelsPerTile = 2.75;
constexpr int64_t kMinTiles = 24;  // 64 channels: 64 pixels 29 us instead of 26, 100 pixels 29 instead of 37
// Not all tiles of a scattered mask are needed to know that they are too many: 12500 pixels took 3 %.
constexpr int64_t kFirstLook = 1024;
constexpr double kScattered = 2.3;  // pixels a tile; random pixels have 2.1 at 50 %

// Tiles of 2 x 2 outputs, at even coordinates, that hold an active pixel. They are [T][5]: the tile's top
// left pixel and the row of each of its four pixels, or -1. Empty where direct convolution is the faster.
Tensor winograd_quads(const Tensor& index, const OptionalTensor& count, IntHeaderOnlyArrayRef geometry) {
  const Geometry g = geometry_of(geometry);
  const int64_t rows = active_rows(index, count), w = g.out_w;
  const int32_t* at = checked_index(index, rows, g.out_pixels());
  std::vector<int32_t> quads;
  quads.reserve(rows / 2 * 5 + 16);
  int64_t i = 0, tiles = 0;
  while (i < rows) {
    const int64_t line = at[i] / w, y = line % g.out_h, top = (line - y % 2) * w;
    int64_t a = i, b = std::lower_bound(at + i, at + rows, int32_t(top + w)) - at;
    const int64_t a_end = b;
    const int64_t b_end =
        y - y % 2 + 1 < g.out_h ? std::lower_bound(at + b, at + rows, int32_t(top + 2 * w)) - at : b;
    while (a < a_end || b < b_end) {
      const int64_t left = std::min(a < a_end ? at[a] - top : w, b < b_end ? at[b] - top - w : w) / 2 * 2;
      int32_t quad[5] = {int32_t(top + left), -1, -1, -1, -1};
      for (; a < a_end && at[a] - top < left + 2; ++a) quad[1 + (at[a] - top - left)] = int32_t(a);
      for (; b < b_end && at[b] - top - w < left + 2; ++b) quad[3 + (at[b] - top - w - left)] = int32_t(b);
      quads.insert(quads.end(), quad, quad + 5);
      ++tiles;
    }
    i = b_end;
    if (i >= kFirstLook && double(i) < kScattered * double(tiles)) return empty({0, 5}, ScalarType::Int);
  }
  if (tiles < kMinTiles || double(rows) < kPixelsPerTile * double(tiles)) tiles = 0;
  Tensor out = empty({tiles, 5}, ScalarType::Int);
  std::copy_n(quads.begin(), tiles * 5, data_of<int32_t>(out));
  return out;
}

// True if the tiles hold every row once, each at its own pixel, so that no output is left as the allocator
// gave it. As winograd_quads lists them: 0.5 ns a row.
bool quads_hold_rows(const Forward& f, const int32_t* quads, int64_t tiles) {
  const int64_t w = f.g.out_w, pixels = f.g.out_pixels();
  int64_t held = 0;
  bool right = true;
  int32_t before = -1;
  for (int64_t t = 0; t < tiles; ++t, quads += 5) {
    const int64_t at = quads[0];
    // tiles ascend, so that no two of them hold the same pixel
    right &= at > before && at < pixels;
    before = quads[0];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t row = quads[1 + i];
      if (row < 0) continue;
      right &= row < f.rows && f.index[row] == at + i / 2 * w + i % 2;
      ++held;
    }
  }
  return right && held == f.rows;
}

}  // namespace

void run_winograd(const Forward& f, const int32_t* quads, int64_t tiles) {
  STD_TORCH_CHECK(f.dtype == Dtype::kFloat32, "quads: expected a float32 convolution with them");
  STD_TORCH_CHECK(quads_hold_rows(f, quads, tiles), "quads: expected tiles that hold each of the ", f.rows,
                  " rows once at its pixel, as cpu_winograd_quads lists them, got ", tiles, " others");
  WinogradPass(f, quads, tiles).run();
}

DYNOPS_CPU_OP(winograd_quads)

}  // namespace dynops::cpu
