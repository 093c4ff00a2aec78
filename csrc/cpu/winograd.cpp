// Winograd convolution where active pixels lie side by side: 2 x 2 outputs from 16 products instead of 36.
//
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (CVPR 2016). The 4 x 4 inputs of a tile
// of outputs are transformed, [16][tile][channel]; 16 products with the transformed weight follow, on the
// same GEMM as all else; their results are brought back to four outputs, finished, and written to the rows
// that are active.
#include "winograd.h"

#include <memory>

#include "pack.h"

namespace dynops::cpu {
namespace {

constexpr int64_t kPositions = 16;
// A tile takes 16 products where direct convolution takes 9 a pixel, and the transforms' time on top: with
// all four pixels active it is 1.45 (64 channels) to 1.8 times as fast (128 and more).
constexpr double kPixelsPerTile = 2.75;
constexpr int64_t kMinTiles = 24;  // 64 channels: 64 pixels 29 us instead of 26, 100 pixels 29 instead of 37
// The tiles of a scattered mask need not all be found to know that they are too many: 12500 pixels took 3 %
// of a layer.
constexpr int64_t kFirstLook = 1024;
constexpr double kScattered = 2.3;  // pixels a tile; random pixels have 2.1 at 50 %
// A transformed weight up to this size stays in the L2 cache while each thread passes its tiles by it; a
// larger one is shared by panels, and the tiles' transformed inputs, up to kSharedInput bytes at a time, by
// all threads.
constexpr int64_t kOwnWeight = 1 << 20;
constexpr int64_t kSharedInput = 4 << 20;
// Bytes of transformed input of a chunk, where a thread has its own: 512 KB is up to 8 % faster than 192, but
// a layer may need no more memory than the dense one and 10 %.
constexpr int64_t kOwnInputLeast = 192 << 10, kOwnInputMost = 512 << 10, kOutputShare = 40;

// Tiles of 2 x 2 outputs, at even coordinates, that hold an active pixel: [T][5], the tile's top left pixel
// and the row of each of its four pixels, or -1. Empty where direct convolution is the faster.
Tensor winograd_quads(const Tensor& index, const OptionalTensor& count, IntHeaderOnlyArrayRef geometry) {
  const Geometry g = geometry_of(geometry);
  const int64_t rows = active_rows(index, count), w = g.out_w;
  const int32_t* at = checked_index(index, rows, g.out_pixels());
  std::vector<int32_t> quads;
  quads.reserve(size_t(rows / 2 * 5 + 16));
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
  std::copy_n(quads.begin(), tiles * 5, static_cast<int32_t*>(out.data_ptr()));
  return out;
}

class WinogradPass {
 public:
  WinogradPass(const Forward& f, const int32_t* quads, int64_t tiles)
      : f_(f), quads_(quads), tiles_(tiles), layout_(panel_layout(f.out_channels, 1, f.in_channels, false)) {
    zeros_.assign(size_t(f.out_channels) + 64, 0.f);
    ones_.assign(size_t(f.out_channels) + 64, 1.f);
  }

  void run() const {
    const double macs = double(tiles_ * kPositions) * double(f_.in_channels * f_.out_channels);
    const int64_t threads = threads_for(macs, kMacsPerThread);
    const int64_t bytes = kPositions * f_.in_channels * 4;
    if (kPositions * layout_.group_bytes <= kOwnWeight || layout_.panels < threads) {
      const int64_t share = f_.rows * f_.out_bytes() / kOutputShare;
      const int64_t own = std::clamp(share, kOwnInputLeast, kOwnInputMost);
      const int64_t chunk = std::max<int64_t>(own / bytes / kTileRows, 1) * kTileRows;
      parallel(threads, [&](int64_t t) {
        if (!f_.packed_out) fill_part(f_, t, threads);
        share_tiles(part(tiles_, t, threads, kTileRows), part(tiles_, t + 1, threads, kTileRows), chunk);
      });
    } else {
      share_panels(threads, std::max<int64_t>(kSharedInput / bytes / kTileRows, 1) * kTileRows);
    }
  }

 private:
  // Each thread with tiles of its own: the weight is small.
  void share_tiles(int64_t begin, int64_t end, int64_t chunk) const {
    if (begin >= end) return;
    const int64_t chunks = (end - begin + chunk - 1) / chunk;
    const int64_t most = std::min(end - begin, part(end - begin, 1, chunks, kTileRows) + kTileRows);
    const std::unique_ptr<float[]> v(new float[size_t(kPositions * most * f_.in_channels)]);
    Work w(most);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t from = begin + part(end - begin, i, chunks, kTileRows);
      const int64_t to = begin + part(end - begin, i + 1, chunks, kTileRows);
      if (from >= to) continue;
      transform(from, to, v.get(), (to - from) * f_.in_channels);
      multiply(from, to, v.get(), 0, layout_.panels, w);
    }
  }

  // Threads transform a chunk of tiles together, then each multiplies it with its own part of a large weight.
  void share_panels(int64_t threads, int64_t chunk) const {
    const int64_t chunks = (tiles_ + chunk - 1) / chunk, most = std::min(tiles_, chunk + kTileRows);
    const std::unique_ptr<float[]> v(new float[size_t(kPositions * most * f_.in_channels)]);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t from = part(tiles_, i, chunks, kTileRows), to = part(tiles_, i + 1, chunks, kTileRows);
      const int64_t stride = (to - from) * f_.in_channels;
      parallel(threads, [&](int64_t t) {
        if (i == 0 && !f_.packed_out) fill_part(f_, t, threads);
        const int64_t a = from + part(to - from, t, threads), b = from + part(to - from, t + 1, threads);
        transform(a, b, v.get() + (a - from) * f_.in_channels, stride);
      });
      parallel(threads, [&](int64_t t) {
        Work w(to - from);
        multiply(from, to, v.get(), part(layout_.panels, t, threads), part(layout_.panels, t + 1, threads),
                 w);
      });
    }
  }

  void transform(int64_t begin, int64_t end, float* v, int64_t stride) const {
    const char* in[kTileRows * kPositions];
    for (int64_t first = begin; first < end; first += kTileRows) {
      const int64_t height = std::min<int64_t>(kTileRows, end - first);
      for (int64_t i = 0; i < height; ++i) inputs_of(quads_[(first + i) * 5], in + i * kPositions);
      kernels().winograd_input(in, int32_t(height), f_.in_channels, v + (first - begin) * f_.in_channels,
                               stride);
    }
  }

  // The 4 x 4 inputs of a tile, zeros outside the map. What lies where no active pixel's window reaches may
  // be anything: the sums of F(2, 3) for one output hold the three inputs of its window and no other.
  void inputs_of(int32_t top_left, const char** in) const {
    const Geometry& g = f_.g;
    const Pixel p = pixel_at(top_left, int32_t(g.out_h), int32_t(g.out_w));
    for (int32_t y = 0; y < 4; ++y) {
      const int64_t line = p.y - g.pad_h + y;
      for (int32_t x = 0; x < 4; ++x) {
        const int64_t column = p.x - g.pad_w + x;
        const bool inside = line >= 0 && line < g.in_h && column >= 0 && column < g.in_w;
        in[y * 4 + x] = f_.source.row(inside ? int32_t((p.n * g.in_h + line) * g.in_w + column) : -1);
      }
    }
  }

  struct Work {
    std::vector<float> m;  // [16][tile][panel]
    std::vector<const char*> in, residual;
    std::vector<char*> to, out;
    std::vector<float> gate;
    explicit Work(int64_t tiles)
        : m(size_t(kPositions * tiles * kernels().panel_width)),
          in(static_cast<size_t>(tiles)),
          residual(size_t(tiles * 4)),
          to(static_cast<size_t>(tiles)),
          out(size_t(tiles * 4)),
          gate(size_t(tiles * 4)) {}
  };

  // Where the outputs of the tiles [begin, end) go, and what is added to them.
  void outputs_of(int64_t begin, int64_t end, Work& w) const {
    for (int64_t i = 0; i < (end - begin) * 4; ++i) {
      const int64_t row = quads_[(begin + i / 4) * 5 + 1 + i % 4];
      w.out[size_t(i)] = nullptr;
      if (row < 0) continue;
      w.out[size_t(i)] = f_.out + (f_.packed_out ? row : f_.index[row]) * f_.out_bytes();
      if (f_.residual) w.residual[size_t(i)] = f_.residual_of(row);
      if (f_.gate) w.gate[size_t(i)] = f_.gate[row];
    }
  }

  void multiply(int64_t begin, int64_t end, const float* v, int64_t panel_begin, int64_t panel_end,
                Work& w) const {
    const int64_t tiles = end - begin, width = kernels().panel_width;
    outputs_of(begin, end, w);
    for (int64_t i = 0; i < tiles; ++i) {
      w.in[size_t(i)] = reinterpret_cast<const char*>(v + i * f_.in_channels);
      w.to[size_t(i)] = reinterpret_cast<char*>(w.m.data() + i * width);
    }
    const int64_t start = 0;
    Gemm gemm{1,
              int32_t(f_.in_channels),
              &start,
              f_.weight,
              layout_,
              Dtype::kFloat32,
              Dtype::kFloat32,
              0,
              0,
              ones_.data(),
              zeros_.data(),
              Activation::kNone};
    const RowBlock products{int32_t(tiles), w.in.data(), w.to.data(), nullptr, nullptr};
    Gemm last = gemm;
    last.scale = f_.affine.scale.data();
    last.shift = f_.affine.shift.data();
    last.activation = f_.activation;
    const RowBlock outputs{int32_t(tiles * 4), nullptr, w.out.data(),
                           f_.residual ? w.residual.data() : nullptr, f_.gate ? w.gate.data() : nullptr};
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      for (int64_t position = 0; position < kPositions; ++position) {
        gemm.weight = f_.weight + position * layout_.group_bytes;
        gemm.in_offset = position * tiles * f_.in_channels * 4;
        gemm.out_offset = (position * tiles - panel) * width * 4;
        kernels().gemm(gemm, products, panel, panel + 1);
      }
      kernels().winograd_output(last, outputs, w.m.data(), tiles * width, panel);
    }
  }

  const Forward& f_;
  const int32_t* quads_;
  int64_t tiles_;
  PanelLayout layout_;
  std::vector<float> zeros_, ones_;
};

}  // namespace

void run_winograd(const Forward& f, const Tensor& quads) {
  STD_TORCH_CHECK(quads.dim() == 2 && quads.size(1) == 5 && quads.scalar_type() == ScalarType::Int,
                  "quads: expected int32 [T, 5], got ", quads.dim(), " dimensions");
  STD_TORCH_CHECK(f.dtype == Dtype::kFloat32, "quads: expected a float32 convolution with them");
  WinogradPass(f, data_of<const int32_t>(quads), quads.size(0)).run();
}

}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def("cpu_winograd_quads(Tensor index, Tensor? count, int[] geometry) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_winograd_quads", TORCH_BOX(&dynops::cpu::winograd_quads));
}
