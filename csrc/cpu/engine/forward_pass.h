// The rows of a convolution on the GEMM, which every forward op on the CPU runs.
//
// They are walked in blocks of a few hundred. So pointer tables stay in the L1 cache, and the whole block
// reuses a weight panel from the L2 cache.
#pragma once

#include <memory>

#include "forward.h"
#include "pack.h"

namespace dynops::cpu {

inline constexpr int64_t kMaxBlockRows = 64 * kTileRows;
inline constexpr int64_t kMinBlockRows = 4 * kTileRows;
inline constexpr int64_t kBlockBytes = 512 * 1024;    // that the rows of a block read, half an L2 cache
inline constexpr int64_t kConvertBytes = 256 * 1024;  // float32 copies of half-precision rows of a block
// A depthwise layer asks ahead for the rows of an input as large as this. 158 x 158 x 128 at 50 % then takes
// 6.3 ns a vector instead of 9.1. A smaller one, which the caches hold, is slower with it (5.5 instead of
// 4.6).
inline constexpr int64_t kPrefetchBytes = 8 << 20;
inline constexpr int32_t kPrefetchRows = 12;

// The working memory of one thread: the tables of one block of rows.
struct RowTables {
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
      const int64_t tap = f.source.merged ? s : rows.taps[s];
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

  // Computes some rows of the class and some panels of each group.
  void run(RowTables& tables, Span rows, Span panels) const {
    if (rows.begin >= rows.end) return;
    // Blocks of equal size: a last block of a few rows would read every weight for little work.
    const int64_t blocks = ceil_div(rows.size(), block_rows_);
    for (int64_t i = 0; i < blocks; ++i) {
      const Span block = share_of(rows.size(), i, blocks, kTileRows);
      if (block.size() == 0) continue;
      prepare(tables, rows.begin + block.begin, int32_t(block.size()));
      multiply(tables, int32_t(block.size()), panels);
    }
  }

  // The two halves of `run` for one block, so that a caller may bring the weight panel by panel.
  void prepare(RowTables& t, int64_t first, int32_t height) const {
    const int32_t* at = pixels_of(t, first, height);
    t.out.resize(height);
    const int64_t bytes = f_.out_bytes();
    for (int32_t i = 0; i < height; ++i)
      t.out[i] = f_.out + (f_.packed_out ? class_.row(first + i) : at[i]) * bytes;
    if (f_.residual) {
      t.residual.resize(height);
      for (int32_t i = 0; i < height; ++i) t.residual[i] = f_.residual_of(class_.row(first + i));
    }
    if (f_.gate) {
      t.gate.resize(height);
      for (int32_t i = 0; i < height; ++i) t.gate[i] = f_.gate[class_.row(first + i)];
    }
    if (table_.patch_bytes() && !t.patches) t.patches.reset(new char[block_rows_ * table_.patch_bytes()]);
    t.in.resize(height * segments_);
    const char** table = t.in.data();
    const TileSplit split(height);
    for (int32_t tile = 0, i = 0; tile < split.tiles; i += split.height(tile), ++tile) {
      table_.fill(at + i, split.height(tile), table, t.patches.get() + i * table_.patch_bytes(),
                  f_.depthwise());
      table += split.height(tile) * segments_;
    }
  }

  void multiply(RowTables& t, int32_t height, Span panels) const {
    RowBlock rows{.rows = height,
                  .in = t.in.data(),
                  .out = t.out.data(),
                  .residual = f_.residual ? t.residual.data() : nullptr,
                  .gate = f_.gate ? t.gate.data() : nullptr,
                  .near = f_.near};
    if (f_.depthwise()) return multiply_depthwise(rows);
    const int64_t element = size_of(f_.dtype);
    const int64_t group_in = f_.in_channels / f_.g.groups, group_out = f_.out_channels / f_.g.groups;
    for (int64_t group = 0; group < f_.g.groups; ++group) {
      Gemm gemm{.segments = int32_t(segments_),
                .depth = int32_t(depth_),
                .weight_start = weight_start_.data(),
                .weight = f_.weight + group * layout_.group_bytes,
                .layout = layout_,
                .in = f_.dtype,
                .out = f_.dtype,
                .in_offset = group * group_in * element,
                .out_offset = group * group_out * element,
                .scale = f_.affine.scale.data() + group * group_out,
                .shift = f_.affine.shift.data() + group * group_out,
                .activation = f_.activation,
                .zero = f_.source.zero};
      if (f_.converts()) {
        t.converted_in.resize(height * segments_);
        to_floats(t.in.data(), height * segments_, gemm.in_offset, f_.dtype, depth_, t.converted,
                  t.converted_in.data());
        rows.in = t.converted_in.data();
        gemm.in = Dtype::kFloat32;
        gemm.in_offset = 0;
        gemm.zero = nullptr;
      }
      kernels().gemm(gemm, rows, panels.begin, panels.end);
    }
  }

 private:
  void multiply_depthwise(const RowBlock& rows) const {
    const int64_t map_bytes = f_.g.in_pixels() * f_.in_channels * size_of(f_.dtype);
    kernels().depthwise({.segments = int32_t(segments_),
                         .prefetch_rows = map_bytes > kPrefetchBytes ? kPrefetchRows : 0,
                         .channels = f_.out_channels,
                         .taps = taps_.data(),
                         .weight = reinterpret_cast<const float*>(f_.weight),
                         .in = f_.dtype,
                         .out = f_.dtype,
                         .scale = f_.affine.scale.data(),
                         .shift = f_.affine.shift.data(),
                         .activation = f_.activation},
                        rows);
  }

  // The output pixels of rows [first, first + height).
  const int32_t* pixels_of(RowTables& t, int64_t first, int32_t height) const {
    if (class_.all) return f_.index + first;
    t.at.resize(height);
    for (int32_t i = 0; i < height; ++i) t.at[i] = f_.index[class_.row(first + i)];
    return t.at.data();
  }

  const Forward& f_;
  const RowClass& class_;
  TapTable table_;
  int64_t segments_, depth_, total_, block_rows_;
  PanelLayout layout_;
  std::vector<int64_t> weight_start_, taps_;
};

// Threads share output channels and not rows where rows are few, so that every thread still works. They do so
// too where half of the weight fits a core's L2 cache and the whole does not.
inline bool shares_panels(int64_t threads, int64_t rows, int64_t panels, int64_t weight_bytes) {
  const bool few_rows = rows < threads * 4 * kTileRows;
  const bool large_weight = weight_bytes > (1 << 20) && rows < threads * kMaxBlockRows;
  return (few_rows || large_weight) && panels >= threads;
}

}  // namespace dynops::cpu
