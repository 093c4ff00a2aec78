// The CPU engine's interface: the ops hand these structures to the kernels of one instruction set.
//
// One computation serves every op: gather rows by pointer, multiply by packed weights, finish
// (affine map, gate, residual, activation), and write rows by pointer. Nothing is materialised.
#pragma once

#include <cstdint>

namespace dynops::cpu {

// kInt8: of experts' weights only.
enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16, kInt8 };
enum class Activation : int32_t {
  kNone,
  kRelu,
  kRelu6,
  kSilu,
  kGelu,
  kGeluTanh,
  kHardswish,
  kRelu2,
  kClampedSwiglu,  // of Glu only
};

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kInt8 ? 1 : 2;
}

// Rows in a tile. 12 x 2 zmm accumulators leave 8 registers for weights and broadcasts, and reach 255-265 of
// 270 GFLOP/s a core on Zen 5. 14 x 2 and 6 x 4 measured the same, 7 x 4 spills (230).
constexpr int kTileRows = 12;

// A packed weight of one group, in panels of `panel_width` columns; the last one is narrower where half a
// panel is enough. A panel is [depth][width], of bfloat16 pairs [depth / 2][width][2].
struct PanelLayout {
  int64_t columns;  // output channels of the group
  int64_t depth;    // taps * channels of the group, each tap rounded up to `depth_step`
  int64_t panels;
  int64_t group_bytes;
};

// Memory that will be read soon: `rows` runs of `bytes`, `stride` bytes apart.
struct Ahead {
  const char* from = nullptr;
  int64_t stride = 0, bytes = 0;
  int32_t rows = 0;
};

// The part of a matrix product that all of its rows share.
struct Gemm {
  int32_t segments;             // pointers a row: the taps, or runs of adjacent taps
  int32_t depth;                // elements behind each pointer
  const int64_t* weight_start;  // [segments]: depth position of each segment in the packed panel
  const char* weight;           // the packed group
  PanelLayout layout;
  Dtype in, out;
  int64_t in_offset = 0;   // bytes from a row pointer to the group's first channel
  int64_t out_offset = 0;  // bytes from an output pointer to the group's first channel
  const float* scale;      // [columns + padding]
  const float* shift;
  Activation activation = Activation::kNone;
  Ahead ahead = {};     // asked for while this multiplies, a few lines at a time
  int32_t vectors = 0;  // of the one panel that `weight` is, at most wide_vectors; 0: panels of panel_width
  const char* zero =
      nullptr;  // the pointer of rows that are zero, or null: where a tile has no other, it skips
};

// Up to a few hundred rows: where they are read and written.
struct RowBlock {
  int32_t rows;
  const char* const* in;  // [tile][segment][rows of the tile] as TileSplit has it; depthwise: [rows][segment]
  char* const* out;       // [rows]
  const char* const* residual = nullptr;  // [rows] or null; dtype of out; may be `out` itself (accumulate)
  const float* gate = nullptr;            // [rows] or null
  bool near = false;  // true if `in` lies in the caches already: nothing is asked for ahead
};

// Rows in a tile of a panel of `vectors` vectors: as many sums as kTileRows x 2.
inline int32_t tile_rows(int32_t vectors) { return vectors <= 2 ? kTileRows : 2 * kTileRows / vectors; }

// Rows are split into tiles of nearly equal height: 39 rows run as 10 + 10 + 10 + 9, all at full rate.
struct TileSplit {
  int32_t tiles, small, large_tiles;
  explicit TileSplit(int32_t rows, int32_t most = kTileRows)
      : tiles((rows + most - 1) / most),
        small(tiles ? rows / tiles : 0),
        large_tiles(tiles ? rows % tiles : 0) {}
  int32_t height(int32_t tile) const { return small + (tile < large_tiles); }
};

// A depthwise convolution of a block of rows: out[i][c] = sum_s in[i][s][c] * weight[s][c].
struct Depthwise {
  int32_t segments;
  int32_t prefetch_rows;  // how many rows ahead to ask for input, 0: not at all
  int64_t channels;
  const int64_t* taps;  // [segments]: row of `weight` for each segment
  const float* weight;  // [taps][channels]
  Dtype in, out;
  const float* scale;
  const float* shift;
  Activation activation;
};

// Rows that each sum their own few taps: out[i][c] = sum_j in[i][j][c] * weight[tap[i][j]][c], j < pairs[i].
// Sums that scatter in the forward direction gather here, so that each row is written once.
struct DepthwisePairs {
  int32_t rows, taps;     // taps: the stride of `in` and `tap`
  const int32_t* pairs;   // [rows]
  const char* const* in;  // [rows][taps]
  const int32_t* tap;     // [rows][taps]
  char* const* out;       // [rows], null: not wanted
  int64_t channels;
  const float* weight;  // [taps][channels]
  Dtype dtype;          // of in and out
};

// Products in a float32 sum. Its error grows with its length, so a longer one is the sum of several. One sum
// of 1152 products was 1.7 times as far from the exact one as the dense layer's, of 18432 products 7.9 times.
// In parts they are 0.65 and 1.0 times as far, and take 0 to 2 % more time (AVX2 3 %). Pairs of bfloat16 are
// rounded to it in the end, which is 300 times the error of one sum of 18432.
inline constexpr int32_t kSumLength = 128;
// The products in a sum of a weight's gradient, from so many rows in all. The dense layer sums a small map
// line by line, and is 2.3 times as exact as one sum of 72 products. Half the length everywhere would take
// 2.5 % more time.
inline int32_t outer_length(int64_t rows) { return rows <= 2 * kSumLength ? kSumLength / 2 : kSumLength; }

// dw[o][c] (+)= sum_k grad[k][o] * x[k][c] over a block of rows, for one panel of columns.
struct OuterProduct {
  int32_t rows;
  const float* grad;  // packed [o tile][rows][height of the tile], as `outputs` splits them
  const float* x;     // packed [rows][panel]
  float* dw;          // [outputs][dw_stride]
  int64_t dw_stride;
  TileSplit outputs;
  int32_t tile_begin = 0, tile_end = outputs.tiles;
  int32_t columns;  // of this panel, <= panel width
  bool add;         // to dw, rather than overwrite it
  int32_t length;   // products in a sum
};

// The live channels of one sample (or head, or group).
struct ChannelList {
  const int32_t* index;     // [count], strictly ascending in [0, channels)
  int32_t count, channels;  // channels: of a whole row

  bool prefix() const { return count == 0 || index[count - 1] == count - 1; }
  bool full() const { return count == channels; }
};

// The live rows and columns of the packed weight of one group, as a packed weight of their own.
struct PanelPick {
  const char* from;
  PanelLayout layout;  // of `from`
  int64_t segments;    // in which the depth falls, each with all rows
  ChannelList rows;    // of a segment
  ChannelList columns;
  bool dot;  // bfloat16 pairs
};

// Columns of a weight in the order of a packed panel: to[row[d]][c] = from[c * step + d] as float32.
struct PackColumns {
  const char* from;
  Dtype dtype;
  int64_t step;            // elements from one column to the next
  int32_t columns, width;  // width: of the panel, whole vectors, zero past the columns
  int32_t count;           // elements of a column
  const int32_t* row;      // [count]
  float* to;               // [rows][width]
};

// Rows of a weight in the order of a packed panel: to[k][c] = from[k * step + c]. Dtype of `to`: float32, or
// bfloat16 in pairs, to[k / 2][c][k % 2], zero past an odd count.
struct PackRows {
  const char* from;
  Dtype dtype;
  int64_t step;            // elements from one row to the next
  int32_t columns, width;  // width: of the panel, whole vectors, zero past the columns
  int32_t count;           // rows
  bool pairs;
  char* to;
};

// sums[i][c] = x[i] . weight[c]: the rows of a weight as they lie, read once for all rows of x.
struct RowDots {
  int32_t rows, columns, depth;
  const char* const* x;  // [rows], float32, or bfloat16 where there is an instruction for its pairs
  Dtype x_dtype;
  const char* weight;
  int64_t weight_stride;  // bytes from one column to the next
  Dtype weight_dtype;
  const char* next;  // columns that are read after these, to ask for; of the same stride
  float* sums;       // [rows][sums_stride]
  int64_t sums_stride;
};

// out[i][c] (+)= weight[i] * activate(scale[c] * sums[i][c] + bias[c])
struct FinishRows {
  int32_t rows = 0, columns = 0;
  const float* sums = nullptr;
  int64_t sums_stride = 0;
  const float* scale = nullptr;  // [columns] or null
  const char* bias = nullptr;    // [columns] or null
  Dtype bias_dtype = Dtype::kFloat32;
  Activation activation = Activation::kNone;
  const float* weight = nullptr;  // [rows] or null
  char* const* out = nullptr;     // [rows]
  Dtype dtype = Dtype::kFloat32;  // of out
  bool add = false;               // to out, which is float32
};

// A packed panel of G w G^T (winograd.cpp) of a float32 3x3 weight: to[position][channel][c].
struct PackWinograd {
  const float* from;  // [column][channel][9]
  int64_t channels;
  int32_t columns, width;
  float* to;
  int64_t position_stride;  // floats
};

// sums[i] = sum_(s, k) weight[s][k] * (x[i] + segment[s])[k]: outputs that share a row of weights.
constexpr int kDotsPadding = 7;
struct Dots {
  int32_t rows, segments, depth;  // depth: elements of a segment
  const int64_t* segment;         // [segments]: bytes
  const char* const* x;           // [rows]
  const char* weight;             // [segments][depth]
  Dtype dtype;                    // of x and weight
  float* sums;                    // [rows + kDotsPadding], the last ones undefined
};

// out[c] = sum_j filter[filter_at[j] + c / group * filter_step] * (in + in_at[j])[c]: a pixel's own filter.
struct LocalFilter {
  int32_t pairs;
  const char* in;
  const int64_t* in_at;  // [pairs]: bytes
  const float* filter;
  const int64_t* filter_at;     // [pairs]
  int64_t filter_step = 0;      // to the next group's
  int64_t groups = 1, group;    // group: channels that share a filter
  const float* wide = nullptr;  // [pairs][groups * group]: the filters channel by channel, or null
  Dtype dtype;                  // of in and out
  char* out;
};

// to[k][i] = sum_e share[k][e] * from[e][i]
struct Mixture {
  const char* from;
  int64_t stride;  // bytes from one term to the next
  int64_t terms;
  const float* share;  // [outputs][terms]
  int64_t outputs;
  Dtype dtype;
  int64_t n;  // elements
  char* const* to;
};

// One row between the two GEMMs of an expert: h = activation(z), or gated activation(gate) * up.
struct Glu {
  Activation activation;
  bool gated;          // z holds gate and up: n of each
  bool interleaved;    // g0 u0 g1 u1 …, not side by side
  float alpha, limit;  // of kClampedSwiglu
  int64_t n;           // columns of h
  int64_t up;          // elements from a row's gates to its ups, where these lie side by side
  Dtype in, out;       // of z, of h; the gradients have their dtypes
};

// Pixels of maps that lie channel by channel, [N, C, H, W]. Channel c of row i lies at[i] + c * channel_bytes
// into the planes, and c * size into the row.
struct PlaneRows {
  int64_t rows, channels;
  const int64_t* at;  // [rows]: bytes
  bool ascends;       // a step of (n - 1) * size from at[i] to at[i + n - 1] means n pixels side by side
  int64_t channel_bytes, row_bytes, size;
};

// Pixels of planes that some rows are spread over: pixel i becomes row row[i], or where that is < 0 zero.
struct PlaneSpread {
  int64_t pixels, channels;
  const int32_t* row;  // [pixels]
  const char* rows;    // channel c of row r at r * row_bytes + c * size
  char* planes;        // channel c of pixel i at c * channel_bytes + i * size
  int64_t channel_bytes, row_bytes, size;
};

// Output pixels of a convolution of planes, a vector of a line at a time. They are finish(sum_t weight[o][t]
// * in[at + offset[t]]) where keep is 1, elsewhere the base or zero.
struct PlaneStrip {
  int32_t outputs, taps;  // taps: of every input channel
  int32_t live, width;    // vectors, and the pixels of each that are stored
  const float* in;
  const int64_t* offset;  // [taps]
  const int64_t* in_at;   // [live]
  const int64_t* out_at;  // [live]: pixels
  const float* keep;      // [live][lanes]: 1 or 0
  const float* weight;    // [outputs][taps]
  const float* scale;     // [outputs]
  const float* shift;
  Activation activation;
  Dtype dtype;       // of base and out
  const char* base;  // as out, or null
  char* out;         // pixel p of output o at o * plane_bytes + p * its size
  int64_t plane_bytes;
};

struct Kernels {
  const char* name;
  int32_t panel_width;   // columns of a full panel
  int32_t lanes;         // floats in a vector: the width of a half panel
  int32_t wide_vectors;  // the most that a panel may have
  bool bf16_dot;         // multiplies bfloat16 pairs, accumulating in float32

  // Copies, or writes zeros where `from` is null; `stream`: past the caches.
  void (*fill)(char* to, const char* from, int64_t bytes, bool stream);
  // to[i][j] = from[i][index[j]], rows in steps of bytes; writes nothing past the count.
  void (*compress)(const char* from, int64_t from_stride, int64_t rows, const ChannelList&, Dtype, char* to,
                   int64_t to_stride);
  // to[i][index[j]] = from[i][j], and `base` or zero (null) at every other channel; `stream`: past the
  // caches, which the caller ends with a fence.
  void (*expand)(const char* from, int64_t from_stride, int64_t rows, const ChannelList&, Dtype,
                 const char* base, int64_t base_stride, char* to, int64_t to_stride, bool stream);
  // to[i][index[j]] += from[i * stride + j]; zero may be added to other channels in [0, channels).
  void (*expand_add)(const float* from, int64_t stride, int64_t rows, const ChannelList&, float* const* to);
  // One panel of live columns, of a segment: to[live row][column], zero past the last column.
  void (*pick_panel)(const PanelPick&, int64_t panel, int64_t segment, char* to);
  void (*gemm)(const Gemm&, const RowBlock&, int64_t panel_begin, int64_t panel_end);
  // v[position][tile][channel] = B^T d B of the 4 x 4 inputs in[tile][16]; strides in floats.
  void (*winograd_input)(const char* const* in, int32_t tiles, int64_t channels, float* v, int64_t stride);
  // out[tile * 4 + i] = what follows the convolution, of A^T m A; rows.out[...] null: not wanted.
  void (*winograd_output)(const Gemm&, const RowBlock&, const float* m, int64_t stride, int64_t panel);
  void (*depthwise)(const Depthwise&, const RowBlock&);
  void (*depthwise_pairs)(const DepthwisePairs&);
  // dw[t][c] += sum_k x[k][t][c] * grad[k][c] over rows; x is [rows][segments], dw [segments][channels]
  void (*depthwise_weight_grad)(int32_t rows, int32_t segments, const char* const* x, const char* const* grad,
                                Dtype dtype, int64_t channels, float* dw);
  void (*outer_product)(const OuterProduct&);
  // to[i][panel width] = `columns` elements at in[i] + offset bytes, as float32
  void (*gather_columns)(const char* const* in, int32_t rows, int64_t offset, Dtype dtype, int32_t columns,
                         float* to);
  void (*dots)(const Dots&);
  void (*local_filter)(const LocalFilter&);
  void (*to_float)(const char* from, Dtype, int64_t n, float* to);
  void (*from_float)(const float* from, int64_t n, Dtype, char* to);
  void (*add_to)(const char* from, Dtype, int64_t n, float* to);  // to[i] += from[i]
  void (*pack_columns)(const PackColumns&);
  void (*pack_winograd)(const PackWinograd&);
  // bfloat16 pairs: to[i][c] = from[2 i][c], from[2 i + 1][c]
  void (*pack_pairs)(const float* from, int64_t pairs, int64_t width, char* to);
  void (*mix)(const Mixture&);
  void (*glu)(const Glu&, const char* z, char* h);
  void (*glu_grad)(const Glu&, const char* grad, const char* z, char* dz);  // grad of h
  void (*pack_rows)(const PackRows&);
  void (*row_dots)(const RowDots&);
  void (*finish_rows)(const FinishRows&);
  void (*gather_planes)(const PlaneRows&, const char* planes, char* rows);
  void (*spread_planes)(const PlaneSpread&);
  void (*plane_strip)(const PlaneStrip&);
  // even[i] = from[2 i], odd[i] = from[2 i + 1], n elements in all
  void (*split_pairs)(const float* from, int64_t n, float* even, float* odd);
};

// The kernels for this machine: the best instruction set that it has, or the one that the
// environment variable DYNOPS_CPU_ISA names (portable, avx2, avx512, avx512_bf16).
const Kernels& kernels();

// Names of the instruction sets that this machine and this build both have, best first.
const char* const* available_isas();

}  // namespace dynops::cpu
