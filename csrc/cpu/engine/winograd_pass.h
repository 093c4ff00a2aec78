// Winograd's F(2x2, 3x3) on tiles of 2 x 2 outputs: what the ops that use it run.
#pragma once

#include <memory>

#include "forward.h"
#include "pack.h"

namespace dynops::cpu {

inline constexpr int64_t kPositions = 16;
// A transformed weight up to this size stays in the L2 cache while each thread passes its tiles by it; a
// larger one is shared by panels, and the tiles' transformed inputs, up to kSharedInput bytes at a time, by
// all threads.
inline constexpr int64_t kOwnWeight = 1 << 20;
inline constexpr int64_t kSharedInput = 4 << 20;
// Bytes of transformed input of a chunk, where a thread has its own: 512 KB is up to 8 % faster than 192, but
// a layer may need no more memory than the dense one and 10 %.
inline constexpr int64_t kOwnInputLeast = 192 << 10, kOwnInputMost = 512 << 10, kOutputShare = 40;

// All tiles of 2 x 2 outputs, as winograd_quads has them.
inline std::vector<int32_t> all_quads(const Geometry& g) {
  std::vector<int32_t> quads;
  quads.reserve(size_t(g.batch * ((g.out_h + 1) / 2) * ((g.out_w + 1) / 2) * 5));
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
      m.resize(size_t(kPositions * tiles * kernels().panel_width));
      in.resize(size_t(tiles));
      to.resize(size_t(tiles));
      residual.resize(size_t(tiles * 4));
      out.resize(size_t(tiles * 4));
      gate.resize(size_t(tiles * 4));
    }
  };

  // `position_bytes`: from the weight of a position to the next one's; 0: they are contiguous.
  WinogradPass(const Forward& f, const int32_t* quads, int64_t tiles, int64_t position_bytes = 0)
      : f_(f), quads_(quads), tiles_(tiles), layout_(panel_layout(f.out_channels, 1, f.in_channels, false)) {
    if (f.whole) {
      layout_.depth = f.whole->depth;
      layout_.group_bytes = f.whole->group_bytes;
    }
    position_bytes_ = position_bytes ? position_bytes : layout_.group_bytes;
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

  // v[position][tile - begin][channel] of the tiles [begin, end); stride: floats from a position to the next.
  void transform(int64_t begin, int64_t end, float* v, int64_t stride) const {
    const char* in[kTileRows * kPositions];
    for (int64_t first = begin; first < end; first += kTileRows) {
      const int64_t height = std::min<int64_t>(kTileRows, end - first);
      for (int64_t i = 0; i < height; ++i) inputs_of(quads_[(first + i) * 5], in + i * kPositions);
      kernels().winograd_input(in, int32_t(height), f_.in_channels, v + (first - begin) * f_.in_channels,
                               stride);
    }
  }

  // The products of the tiles [begin, end) with the panels, and what follows them.
  void multiply(int64_t begin, int64_t end, const float* v, int64_t panel_begin, int64_t panel_end,
                Work& w) const {
    const int64_t tiles = end - begin, width = kernels().panel_width;
    w.resize(tiles);
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
    // whole vectors: the products have room for them, and the weight's columns past the last are zero
    gemm.layout.columns = (layout_.columns + kernels().lanes - 1) / kernels().lanes * kernels().lanes;
    const RowBlock products{int32_t(tiles), w.in.data(), w.to.data(), nullptr, nullptr};
    Gemm last = gemm;
    last.layout = layout_;  // outputs may lie in rows without that room
    last.scale = f_.affine.scale.data();
    last.shift = f_.affine.shift.data();
    last.activation = f_.activation;
    const RowBlock outputs{int32_t(tiles * 4), nullptr, w.out.data(),
                           f_.residual ? w.residual.data() : nullptr, f_.gate ? w.gate.data() : nullptr};
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      for (int64_t position = 0; position < kPositions; ++position) {
        gemm.weight = f_.weight + position * position_bytes_;
        gemm.in_offset = position * tiles * f_.in_channels * 4;
        gemm.out_offset = (position * tiles - panel) * width * 4;
        kernels().gemm(gemm, products, panel, panel + 1);
      }
      kernels().winograd_output(last, outputs, w.m.data(), tiles * width, panel);
    }
  }

 private:
  // Each thread with tiles of its own: the weight is small.
  void share_tiles(int64_t begin, int64_t end, int64_t chunk) const {
    if (begin >= end) return;
    const int64_t chunks = (end - begin + chunk - 1) / chunk;
    const int64_t most = std::min(end - begin, part(end - begin, 1, chunks, kTileRows) + kTileRows);
    const std::unique_ptr<float[]> v(new float[size_t(kPositions * most * f_.in_channels)]);
    Work w;
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
        Work w;
        multiply(from, to, v.get(), part(layout_.panels, t, threads), part(layout_.panels, t + 1, threads),
                 w);
      });
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

  const Forward& f_;
  const int32_t* quads_;
  int64_t tiles_, position_bytes_;
  PanelLayout layout_;
  std::vector<float> zeros_, ones_;
};

}  // namespace dynops::cpu
