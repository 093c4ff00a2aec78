// Winograd's F(2x2, 3x3) on tiles of 2 x 2 outputs, for all the ops that use it.
#pragma once

#include <memory>

#include "forward.h"
#include "pack.h"

namespace dynops::cpu {

inline constexpr int64_t kPositions = 16;
// A transformed weight up to this size stays in the L2 cache while each thread passes its tiles by it. Of a
// larger one each thread takes some panels. Then all threads share the tiles' transformed inputs, up to
// kSharedInput bytes at a time.
inline constexpr int64_t kOwnWeight = 1 << 20;
inline constexpr int64_t kSharedInput = 4 << 20;
// Bytes of transformed input of a chunk, where a thread has its own. 512 KB is up to 8 % faster than 192, but
// a layer may need at most 10 % more memory than the dense one.
inline constexpr int64_t kOwnInputLeast = 192 << 10, kOwnInputMost = 512 << 10, kOutputShare = 40;

// All tiles of 2 x 2 outputs, as winograd_quads has them.
inline std::vector<int32_t> all_quads(const Geometry& g) {
  std::vector<int32_t> quads;
  quads.reserve(g.batch * ceil_div(g.out_h, 2) * ceil_div(g.out_w, 2) * 5);
  const int32_t h = int32_t(g.out_h), w = int32_t(g.out_w);
  for (int32_t n = 0; n < g.batch; ++n) {
    for (int32_t y = 0; y < h; y += 2) {
      for (int32_t x = 0; x < w; x += 2) {
        const int32_t at = (n * h + y) * w + x;
        const bool right = x + 1 < w, below = y + 1 < h;
        quads.insert(quads.end(),
                     {at, at, right ? at + 1 : -1, below ? at + w : -1, right && below ? at + w + 1 : -1});
      }
    }
  }
  return quads;
}

class WinogradPass {
 public:
  // The working memory of one thread.
  struct Work {
    std::vector<float> m;  // [16][tile][panel]
    std::vector<const char*> in, residual;
    std::vector<char*> to, out;
    std::vector<float> gate;
    void resize(int64_t tiles) {
      m.resize(kPositions * tiles * kernels().panel_width);
      in.resize(tiles);
      to.resize(tiles);
      residual.resize(tiles * 4);
      out.resize(tiles * 4);
      gate.resize(tiles * 4);
    }
  };

  // `position_bytes`: from the weight of a position to the next one's; 0: they are contiguous.
  WinogradPass(const Forward& f, const int32_t* quads, int64_t tiles, int64_t position_bytes = 0)
      : f_(f),
        quads_(quads),
        tiles_(tiles),
        layout_(panel_layout(f.out_channels, 1, f.in_channels, false)),
        none_(f.out_channels) {
    if (f.whole) {
      layout_.depth = f.whole->depth;
      layout_.group_bytes = f.whole->group_bytes;
    }
    position_bytes_ = position_bytes ? position_bytes : layout_.group_bytes;
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
        if (!f_.packed_out) fill_share(f_, t, threads);
        share_tiles(share_of(tiles_, t, threads, kTileRows), chunk);
      });
    } else {
      share_panels(threads, std::max<int64_t>(kSharedInput / bytes / kTileRows, 1) * kTileRows);
    }
  }

  // v[position][tile - begin][channel] of some tiles; stride: floats from a position to the next.
  void transform(Span tiles, float* v, int64_t stride) const {
    const char* in[kTileRows * kPositions];
    for (int64_t first = tiles.begin; first < tiles.end; first += kTileRows) {
      const int64_t height = std::min<int64_t>(kTileRows, tiles.end - first);
      for (int64_t i = 0; i < height; ++i) inputs_of(quads_[(first + i) * 5], in + i * kPositions);
      kernels().winograd_input(in, int32_t(height), f_.in_channels,
                               v + (first - tiles.begin) * f_.in_channels, stride);
    }
  }

  // The products of some tiles with some panels, and what follows them.
  void multiply(Span tiles, const float* v, Span panels, Work& w) const {
    const int64_t count = tiles.size(), width = kernels().panel_width, start = 0;
    w.resize(count);
    outputs_of(tiles, w);
    for (int64_t i = 0; i < count; ++i) {
      w.in[i] = bytes_of(v + i * f_.in_channels);
      w.to[i] = bytes_of(w.m.data() + i * width);
    }
    Gemm gemm{.segments = 1,
              .depth = int32_t(f_.in_channels),
              .weight_start = &start,
              .weight = f_.weight,
              .layout = layout_,
              .in = Dtype::kFloat32,
              .out = Dtype::kFloat32,
              .scale = none_.scale.data(),
              .shift = none_.shift.data()};
    Gemm last = gemm;  // its outputs may lie in rows without room for whole vectors
    last.scale = f_.affine.scale.data();
    last.shift = f_.affine.shift.data();
    last.activation = f_.activation;
    // the products have room for whole vectors, and the weight's columns past the last are zero
    gemm.layout.columns = round_up(layout_.columns, kernels().lanes);
    const RowBlock products{.rows = int32_t(count), .in = w.in.data(), .out = w.to.data()};
    const RowBlock outputs{.rows = int32_t(count * 4),
                           .in = nullptr,
                           .out = w.out.data(),
                           .residual = f_.residual ? w.residual.data() : nullptr,
                           .gate = f_.gate ? w.gate.data() : nullptr};
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      for (int64_t position = 0; position < kPositions; ++position) {
        gemm.weight = f_.weight + position * position_bytes_;
        gemm.in_offset = position * count * f_.in_channels * 4;
        gemm.out_offset = (position * count - panel) * width * 4;
        kernels().gemm(gemm, products, panel, panel + 1);
      }
      kernels().winograd_output(last, outputs, w.m.data(), count * width, panel);
    }
  }

 private:
  // Each thread with tiles of its own: the weight is small.
  void share_tiles(Span tiles, int64_t chunk) const {
    if (tiles.begin >= tiles.end) return;
    const int64_t chunks = ceil_div(tiles.size(), chunk);
    const int64_t most = std::min(tiles.size(), share_of(tiles.size(), 0, chunks, kTileRows).end + kTileRows);
    const std::unique_ptr<float[]> v(new float[kPositions * most * f_.in_channels]);
    Work w;
    for (int64_t i = 0; i < chunks; ++i) {
      const Span one = share_of(tiles.size(), i, chunks, kTileRows);
      const Span mine{tiles.begin + one.begin, tiles.begin + one.end};
      if (mine.size() == 0) continue;
      transform(mine, v.get(), mine.size() * f_.in_channels);
      multiply(mine, v.get(), {0, layout_.panels}, w);
    }
  }

  // Of a large weight: threads transform a chunk of tiles together, then each multiplies by its own panels.
  void share_panels(int64_t threads, int64_t chunk) const {
    const int64_t chunks = ceil_div(tiles_, chunk), most = std::min(tiles_, chunk + kTileRows);
    const std::unique_ptr<float[]> v(new float[kPositions * most * f_.in_channels]);
    for (int64_t i = 0; i < chunks; ++i) {
      const Span tiles = share_of(tiles_, i, chunks, kTileRows);
      const int64_t stride = tiles.size() * f_.in_channels;
      parallel(threads, [&](int64_t t) {
        if (i == 0 && !f_.packed_out) fill_share(f_, t, threads);
        const Span mine = share_of(tiles.size(), t, threads);
        transform({tiles.begin + mine.begin, tiles.begin + mine.end}, v.get() + mine.begin * f_.in_channels,
                  stride);
      });
      parallel(threads, [&](int64_t t) {
        Work w;
        multiply(tiles, v.get(), share_of(layout_.panels, t, threads), w);
      });
    }
  }

  // The 4 x 4 inputs of a tile, zeros outside the map. Inputs that no active pixel's window reaches may hold
  // anything. The sums of F(2, 3) for one output hold the three inputs of its window and no other.
  void inputs_of(int32_t top_left, const char** in) const {
    const Geometry& g = f_.g;
    const Pixel p = g.out_pixel(top_left);
    for (int32_t y = 0; y < 4; ++y) {
      const int64_t line = p.y - g.pad_h + y;
      for (int32_t x = 0; x < 4; ++x) {
        const int64_t column = p.x - g.pad_w + x;
        const bool inside = line >= 0 && line < g.in_h && column >= 0 && column < g.in_w;
        in[y * 4 + x] = f_.source.row(inside ? int32_t((p.n * g.in_h + line) * g.in_w + column) : -1);
      }
    }
  }

  // Finds the places of some tiles' outputs, and of the residuals and gates that they meet.
  void outputs_of(Span tiles, Work& w) const {
    for (int64_t i = 0; i < tiles.size() * 4; ++i) {
      const int64_t row = quads_[(tiles.begin + i / 4) * 5 + 1 + i % 4];
      w.out[i] = nullptr;
      if (row < 0) continue;
      w.out[i] = f_.out + (f_.packed_out ? row : f_.index[row]) * f_.out_bytes();
      if (f_.residual) w.residual[i] = f_.residual_of(row);
      if (f_.gate) w.gate[i] = f_.gate[row];
    }
  }

  const Forward& f_;
  const int32_t* quads_;
  int64_t tiles_, position_bytes_;
  PanelLayout layout_;
  Affine none_;  // of the products, which are finished later
};

}  // namespace dynops::cpu
