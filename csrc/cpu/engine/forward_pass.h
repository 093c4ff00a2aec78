// The rows of a convolution on the GEMM: what every forward op on the CPU runs.
//
// They are walked in blocks of a few hundred, so that pointer tables stay in the L1 cache and a weight panel
// is reused from the L2 cache over the whole block.
#pragma once

#include <memory>

#include "forward.h"
#include "pack.h"

namespace dynops::cpu {

inline constexpr int64_t kMaxBlockRows = 64 * kTileRows;
// A depthwise layer asks for the rows of an input as large as this ahead of time: 158 x 158 x 128 at 50 % 6.3
// ns a vector instead of 9.1; a smaller one, which the caches hold, is slower with it (5.5 instead of 4.6).
inline constexpr int64_t kPrefetchBytes = 8 << 20;
inline constexpr int32_t kPrefetchRows = 12;
inline constexpr int64_t kMinBlockRows = 4 * kTileRows;
inline constexpr int64_t kBlockBytes = 512 * 1024;    // what the rows of a block read, half an L2 cache
inline constexpr int64_t kConvertBytes = 256 * 1024;  // float32 copies of half-precision rows of a block

// The working memory of one thread: the tables of one block of rows.
struct Block {
  std::vector<int32_t> at;  // output pixels, where they do not lie side by side in the index
  std::vector<const char*> in, residual;
  std::vector<char*> out;
  std::vector<float> gate, converted;
  std::vector<const char*> converted_in;
  std::unique_ptr<char[]> patches;
};

class ForwardPass {
 public:
  ForwardPass(const Forward& f, const RowClass& rows) : f_(f), class_(rows), table_(f.source, rows.taps) {
    segments_ = f.source.merged ? f.g.kernel_h : int64_t(rows.taps.size());
    const int64_t segment_taps = f.source.merged ? f.g.kernel_w : 1;
    depth_ = segment_taps * f.in_channels / f.g.groups;
    const int64_t all_segments = f.g.taps() / segment_taps;
    layout_ = panel_layout(f.out_channels / f.g.groups, all_segments, depth_, f.dot());
    if (f.whole) {
      layout_.depth = f.whole->depth;
      layout_.group_bytes = f.whole->group_bytes;
    }
    for (int64_t s = 0; s < segments_; ++s) {
      const int64_t tap = f.source.merged ? s : rows.taps[size_t(s)];
      const int64_t segment = f.turned ? all_segments - 1 - tap : tap;
      weight_start_.push_back(segment * (layout_.depth / all_segments));
      taps_.push_back(segment);
    }
    total_ = class_.size(f.rows);
    const int64_t reads = std::max<int64_t>(segments_ * depth_, 1);  // elements a row reads
    block_rows_ =
        f.converts() ? kConvertBytes / (4 * reads) : std::max(kBlockBytes / (4 * reads), kMinBlockRows);
    block_rows_ = std::clamp<int64_t>(block_rows_ / kTileRows * kTileRows, kTileRows, kMaxBlockRows);
  }

  int64_t rows() const { return total_; }
  int64_t panels() const { return f_.depthwise() ? 1 : layout_.panels; }
  double macs() const { return double(total_) * double(segments_ * depth_) * double(f_.out_channels); }

  // Computes the rows [begin, end) of the class and the panels [panel_begin, panel_end) of each group.
  void run(int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) const {
    Block b;
    run(b, begin, end, panel_begin, panel_end);
  }

  // The same with the caller's working memory.
  void run(Block& b, int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) const {
    if (begin >= end) return;
    // Blocks of equal size: a last block of a few rows would read every weight for little work.
    const int64_t blocks = (end - begin + block_rows_ - 1) / block_rows_;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t from = begin + part(end - begin, i, blocks, kTileRows);
      const int64_t to = begin + part(end - begin, i + 1, blocks, kTileRows);
      if (from >= to) continue;
      prepare(b, from, int32_t(to - from));
      multiply(b, int32_t(to - from), panel_begin, panel_end);
    }
  }

  // The two halves of `run` for one block, so that a caller may bring the weight panel by panel.
  void prepare(Block& b, int64_t first, int32_t height) const {
    const int32_t* at = pixels_of(b, first, height);
    b.out.resize(size_t(height));
    const int64_t bytes = f_.out_bytes();
    for (int32_t i = 0; i < height; ++i)
      b.out[size_t(i)] = f_.out + (f_.packed_out ? class_.row(first + i) : at[i]) * bytes;
    if (f_.residual) {
      b.residual.resize(size_t(height));
      for (int32_t i = 0; i < height; ++i) b.residual[size_t(i)] = f_.residual_of(class_.row(first + i));
    }
    if (f_.gate) {
      b.gate.resize(size_t(height));
      for (int32_t i = 0; i < height; ++i) b.gate[size_t(i)] = f_.gate[class_.row(first + i)];
    }
    if (table_.patch_bytes() && !b.patches)
      b.patches.reset(new char[size_t(block_rows_ * table_.patch_bytes())]);
    b.in.resize(size_t(height * segments_));
    const char** table = b.in.data();
    const TileSplit split(height);
    for (int32_t tile = 0, i = 0; tile < split.tiles; i += split.height(tile), ++tile) {
      table_.fill(at + i, split.height(tile), table, b.patches.get() + i * table_.patch_bytes(),
                  f_.depthwise());
      table += split.height(tile) * segments_;
    }
  }

  void multiply(Block& b, int32_t height, int64_t panel_begin, int64_t panel_end) const {
    RowBlock rows{height,
                  b.in.data(),
                  b.out.data(),
                  f_.residual ? b.residual.data() : nullptr,
                  f_.gate ? b.gate.data() : nullptr,
                  f_.near};
    if (f_.depthwise()) {
      const int64_t map_bytes = f_.g.in_pixels() * f_.in_channels * size_of(f_.dtype);
      const Depthwise d{int32_t(segments_),
                        map_bytes > kPrefetchBytes ? kPrefetchRows : 0,
                        f_.out_channels,
                        taps_.data(),
                        reinterpret_cast<const float*>(f_.weight),
                        f_.dtype,
                        f_.dtype,
                        f_.affine.scale.data(),
                        f_.affine.shift.data(),
                        f_.activation};
      return kernels().depthwise(d, rows);
    }
    const int64_t element = size_of(f_.dtype);
    const int64_t group_in = f_.in_channels / f_.g.groups, group_out = f_.out_channels / f_.g.groups;
    for (int64_t group = 0; group < f_.g.groups; ++group) {
      Gemm gemm{int32_t(segments_),
                int32_t(depth_),
                weight_start_.data(),
                f_.weight + group * layout_.group_bytes,
                layout_,
                f_.dtype,
                f_.dtype,
                group * group_in * element,
                group * group_out * element,
                f_.affine.scale.data() + group * group_out,
                f_.affine.shift.data() + group * group_out,
                f_.activation};
      if (f_.converts()) {
        convert(b, height, gemm.in_offset);
        rows.in = b.converted_in.data();
        gemm.in = Dtype::kFloat32;
        gemm.in_offset = 0;
      }
      kernels().gemm(gemm, rows, panel_begin, panel_end);
    }
  }

 private:
  // The output pixels of rows [first, first + height).
  const int32_t* pixels_of(Block& b, int64_t first, int32_t height) const {
    if (class_.all) return f_.index + first;
    b.at.resize(size_t(height));
    for (int32_t i = 0; i < height; ++i) b.at[size_t(i)] = f_.index[class_.row(first + i)];
    return b.at.data();
  }

  // The group's channels of every row as float32, and a table of pointers to them.
  void convert(Block& b, int32_t height, int64_t in_offset) const {
    const int64_t runs = height * segments_;
    b.converted.resize(size_t(runs * depth_));
    b.converted_in.resize(size_t(runs));
    for (int64_t i = 0; i < runs; ++i) {
      float* to = b.converted.data() + i * depth_;
      kernels().to_float(b.in[size_t(i)] + in_offset, f_.dtype, depth_, to);
      b.converted_in[size_t(i)] = reinterpret_cast<const char*>(to);
    }
  }

  const Forward& f_;
  const RowClass& class_;
  TapTable table_;
  int64_t segments_, depth_, total_, block_rows_;
  PanelLayout layout_;
  std::vector<int64_t> weight_start_, taps_;
};

// How threads share rows x panels. Rows are cut where every thread gets whole tiles; output channels
// where rows are few, so that every thread still works, or where half of the weight fits a core's L2
// cache and the whole does not.
struct Partition {
  int64_t row_parts, panel_parts;
  Partition(int64_t threads, int64_t rows, int64_t panels, int64_t weight_bytes)
      : row_parts(threads), panel_parts(1) {
    const bool few_rows = rows < threads * 4 * kTileRows;
    const bool large_weight = weight_bytes > (1 << 20) && rows < threads * kMaxBlockRows;
    if ((few_rows || large_weight) && panels >= threads) {
      panel_parts = threads;
      row_parts = 1;
    }
  }
};

}  // namespace dynops::cpu
