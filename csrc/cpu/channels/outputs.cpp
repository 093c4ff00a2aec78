// Convolution at selected (channel, pixel) positions on the CPU: a dot product for each.
//
// Works on blocks of up to 8 x 8 output pixels. The input under a block is copied into a tile in the L1
// cache, padded and in the dtype of the products. Then each channel's row of weights meets its selected
// pixels.
#include <array>
#include <cstring>

#include "../../common/tensors.h"
#include "../engine/forward.h"

namespace dynops::cpu {
namespace {

constexpr int64_t kSide = 8;                 // output pixels of a block, each way: its mask is 64 bits
constexpr int64_t kTileBytes = 42 << 10;     // of the input under a block: most of an L1 cache
constexpr int64_t kWeightBytes = 512 << 10;  // of the outputs that a block computes: half an L2 cache

struct MaskedConv {
  Geometry g;
  const char* x;          // [N, H, W, C], at the first channel that is read
  int64_t pixel_bytes;    // of x
  Dtype dtype;            // of x, partial, out
  Dtype product;          // of weight and tile: float32, or bfloat16 pairs
  const char* weight;     // [chunks][outputs][taps][depth]
  int64_t inputs;         // channels of a group
  int64_t chunks, depth;  // the inputs in nearly equal runs, padded with zeros
  int64_t outputs;
  const float* bias;
  const uint8_t* mask;
  std::array<int64_t, 4> mask_stride;
  const char* partial;  // [N, H, W, O] or null
  char* out;            // [N, H, W, O]

  int64_t row_bytes() const { return depth * size_of(product); }
};

// The blocks of pixels and panels of channels that outputs are cut into.
struct Cut {
  int64_t height, width, in_height, in_width;  // of a block and the input under it
  int64_t lines, columns;                      // blocks of a map
  int64_t panel, panels_of_group;

  Cut(const MaskedConv& c, int64_t threads) {
    const Geometry& g = c.g;
    size(g, kSide, kSide);
    while (in_height * in_width * c.row_bytes() > kTileBytes && height * width > 1) {
      height >= width ? size(g, height - 1, width) : size(g, height, width - 1);
    }
    const int64_t outputs = c.outputs / g.groups;
    const int64_t most = std::max<int64_t>(kWeightBytes / (c.chunks * g.taps() * c.row_bytes()), 16);
    panels_of_group = std::max(ceil_div(outputs, most), blocks(g) < 2 * threads ? threads : 1);
    panel = ceil_div(outputs, panels_of_group);
    panels_of_group = ceil_div(outputs, panel);
  }
  int64_t blocks(const Geometry& g) const { return g.batch * lines * columns; }

 private:
  // Nearly equal blocks of at most this size.
  void size(const Geometry& g, int64_t most_height, int64_t most_width) {
    lines = ceil_div(g.out_h, most_height), columns = ceil_div(g.out_w, most_width);
    height = ceil_div(g.out_h, lines), width = ceil_div(g.out_w, columns);
    in_height = (height - 1) * g.stride_h + (g.kernel_h - 1) * g.dil_h + 1;
    in_width = (width - 1) * g.stride_w + (g.kernel_w - 1) * g.dil_w + 1;
  }
};

// The working memory of one thread, and one panel of one block at a time.
class Worker {
 public:
  Worker(const MaskedConv& c, const Cut& cut)
      : c_(c),
        cut_(cut),
        tile_(cut.in_height * cut.in_width * c.row_bytes() + 64),
        bits_(cut.panel),
        sums_(c.chunks > 1 ? cut.panel * kSide * kSide : 0),
        row_step_(round_up(cut.panel, 16) + 16),
        rows_(row_step_ * kSide * kSide) {
    for (int64_t r = 0; r < c.g.kernel_h; ++r) {
      for (int64_t s = 0; s < c.g.kernel_w; ++s) taps_.push_back(offset(r * c.g.dil_h, s * c.g.dil_w));
    }
  }

  // Channels of one panel at the pixels of one block.
  void run(int64_t panel, int64_t block) {
    const int64_t outputs = c_.outputs / c_.g.groups;
    group_ = panel / cut_.panels_of_group;
    begin_ = group_ * outputs + panel % cut_.panels_of_group * cut_.panel;
    end_ = std::min(begin_ + cut_.panel, (group_ + 1) * outputs);
    n_ = block / (cut_.lines * cut_.columns);
    y_ = block / cut_.columns % cut_.lines * cut_.height;
    x_ = block % cut_.columns * cut_.width;
    height_ = std::min(cut_.height, c_.g.out_h - y_), width_ = std::min(cut_.width, c_.g.out_w - x_);
    if (height_ <= 0 || width_ <= 0) return;
    std::fill(rows_.begin(), rows_.end(), c_.partial ? -0.f : 0.f);  // -0 + partial is partial, to the bit
    if (read_mask()) {
      for (int64_t chunk = 0; chunk < c_.chunks; ++chunk) {
        load_tile(chunk);
        multiply(chunk);
      }
    }
    write();
  }

 private:
  int64_t offset(int64_t y, int64_t x) const { return (y * cut_.in_width + x) * c_.row_bytes(); }
  char* tile() { return (char*)((uintptr_t(tile_.data()) + 63) & ~uintptr_t(63)); }

  // bits_[o]: which pixels of the block channel o computes. Returns whether any does.
  bool read_mask() {
    const auto& stride = c_.mask_stride;
    const uint8_t* from = c_.mask + n_ * stride[0] + begin_ * stride[1] + y_ * stride[2] + x_ * stride[3];
    std::fill(bits_.begin(), bits_.end(), 0);
    for (int64_t i = 0; i < height_; ++i) {
      for (int64_t o = 0; o < end_ - begin_;) o += read_line(from + i * stride[2] + o * stride[1], i, o);
    }
    uint64_t any = 0;
    for (uint64_t bits : bits_) any |= bits;
    return any != 0;
  }

  // Line i of the block (at most 8 pixels) for channel o, or for 8 of them where these lie side by side.
  // A bool is a byte of 0 or 1. Returns how many channels.
  int64_t read_line(const uint8_t* from, int64_t i, int64_t o) {
    const int64_t of_channel = c_.mask_stride[1], of_pixel = c_.mask_stride[3];
    if (of_channel == 1 && end_ - begin_ - o >= 8) {
      uint64_t line = 0, bytes;  // in byte k the pixels of channel o + k
      for (int64_t j = 0; j < width_; ++j) {
        std::memcpy(&bytes, from + j * of_pixel, 8);
        line |= bytes << j;
      }
      for (int64_t k = 0; k < 8; ++k) bits_[o + k] |= (line >> (8 * k) & 0xff) << (i * width_);
      return 8;
    }
    uint64_t line = 0;
    if (of_pixel == 1 && width_ == 8) {
      std::memcpy(&line, from, 8);
      line = line * 0x0102040810204080 >> 56;  // the lowest bit of each byte, side by side
    } else {
      for (int64_t j = 0; j < width_; ++j) line |= uint64_t(from[j * of_pixel] != 0) << j;
    }
    bits_[o] |= line << (i * width_);
    return 1;
  }

  // The input under the block, of one chunk of channels.
  void load_tile(int64_t chunk) {
    const Geometry& g = c_.g;
    const int64_t first = chunk * c_.depth, channels = std::min(c_.depth, c_.inputs - first);
    const int64_t element = size_of(c_.product), y0 = y_ * g.stride_h - g.pad_h,
                  x0 = x_ * g.stride_w - g.pad_w;
    const char* from = c_.x + (group_ * c_.inputs + first) * size_of(c_.dtype);
    for (int64_t i = 0; i < cut_.in_height; ++i) {
      const int64_t y = y0 + i;
      for (int64_t j = 0; j < cut_.in_width; ++j) {
        const int64_t x = x0 + j;
        char* to = tile() + offset(i, j);
        if (y < 0 || y >= g.in_h || x < 0 || x >= g.in_w) {
          std::memset(to, 0, c_.row_bytes());
          continue;
        }
        const char* pixel = from + ((n_ * g.in_h + y) * g.in_w + x) * c_.pixel_bytes;
        if (c_.dtype == c_.product) {
          std::memcpy(to, pixel, channels * element);
        } else {
          kernels().to_float(pixel, c_.dtype, channels, (float*)to);
        }
        if (channels < c_.depth) std::memset(to + channels * element, 0, (c_.depth - channels) * element);
      }
    }
  }

  void multiply(int64_t chunk) {
    const int64_t weight_bytes = c_.g.taps() * c_.row_bytes();
    const char* pixel_x[kSide * kSide];
    for (int64_t i = 0, pixel = 0; i < height_; ++i) {
      for (int64_t j = 0; j < width_; ++j) {
        pixel_x[pixel++] = tile() + offset(i * c_.g.stride_h, j * c_.g.stride_w);
      }
    }
    float* kept = sums_.data();
    for (int64_t o = begin_; o < end_; ++o) {
      uint64_t bits = bits_[o - begin_];
      if (!bits) continue;
      const char* x[kSide * kSide];
      float sums[kSide * kSide + kDotsPadding];
      int32_t pixel[kSide * kSide], live = 0;
      for (; bits; bits &= bits - 1, ++live) {
        pixel[live] = int32_t(__builtin_ctzll(bits));
        x[live] = pixel_x[pixel[live]];
      }
      kernels().dots({.rows = live,
                      .segments = int32_t(taps_.size()),
                      .depth = int32_t(c_.depth),
                      .segment = taps_.data(),
                      .x = x,
                      .weight = c_.weight + (chunk * c_.outputs + o) * weight_bytes,
                      .dtype = c_.product,
                      .sums = sums});
      if (c_.chunks > 1) {
        for (int32_t i = 0; chunk && i < live; ++i) sums[i] += kept[i];
        std::memcpy(kept, sums, live * 4);
        kept += live;
      }
      if (chunk + 1 < c_.chunks) continue;
      float* row = rows_.data() + (o - begin_);
      for (int32_t i = 0; i < live; ++i) row[pixel[i] * row_step_] = sums[i] + c_.bias[o];
    }
  }

  void write() {
    const int64_t element = size_of(c_.dtype), count = end_ - begin_;
    float* row = rows_.data();
    for (int64_t i = 0; i < height_; ++i) {
      for (int64_t j = 0; j < width_; ++j, row += row_step_) {
        const int64_t at =
            (((n_ * c_.g.out_h + y_ + i) * c_.g.out_w + x_ + j) * c_.outputs + begin_) * element;
        if (c_.partial) kernels().add_to(c_.partial + at, c_.dtype, count, row);
        kernels().from_float(row, count, c_.dtype, c_.out + at);
      }
    }
  }

  const MaskedConv& c_;
  const Cut& cut_;
  std::vector<char> tile_;
  std::vector<int64_t> taps_;
  std::vector<uint64_t> bits_;
  std::vector<float> sums_;  // of the chunks so far: the selected pixels of one channel after another
  int64_t row_step_;         // a line of the cache more than a panel: pixels fall into different sets
  std::vector<float> rows_;  // [pixels][row_step_]: the result
  int64_t group_ = 0, begin_ = 0, end_ = 0, n_ = 0, y_ = 0, x_ = 0, height_ = 0, width_ = 0;
};

// x, partial and out must be channels_last; weight as cpp_channel_outputs.py packs it.
void masked_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& mask,
                 const OptionalTensor& partial, int64_t begin, int64_t inputs, IntHeaderOnlyArrayRef geometry,
                 Tensor out) {
  const Geometry g = geometry_of(geometry);
  const Dtype dtype = dtype_of(x), product = dtype_of(weight);
  const int64_t outputs = out.size(1);
  STD_TORCH_CHECK(begin >= 0 && begin + inputs * g.groups <= x.size(1) && x.size(0) == g.batch &&
                      x.size(2) == g.in_h && x.size(3) == g.in_w,
                  "x: expected channels ", begin, " to ", begin + inputs * g.groups, ", got ", x.size(1));
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == outputs && weight.size(2) == g.taps() &&
                      outputs % g.groups == 0 && !g.transposed && weight.size(0) * weight.size(3) >= inputs &&
                      (weight.size(0) - 1) * weight.size(3) < inputs,
                  "weight: expected [chunks, ", outputs, ", ", g.taps(), ", depth], got [", weight.size(0),
                  ", ", weight.size(1), ", ", weight.size(2), ", ", weight.size(3), "]");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 4 && mask.size(0) == g.batch &&
                      mask.size(1) == outputs && mask.size(2) == g.out_h && mask.size(3) == g.out_w,
                  "mask: expected bool of the output's shape");
  if (out.numel() == 0) return;
  const std::vector<float> shift = channel_vector(bias, outputs, 0.f);
  const MaskedConv c{.g = g,
                     .x = data_of<const char>(x) + begin * size_of(dtype),
                     .pixel_bytes = x.size(1) * size_of(dtype),
                     .dtype = dtype,
                     .product = product,
                     .weight = data_of<const char>(weight),
                     .inputs = inputs,
                     .chunks = weight.size(0),
                     .depth = weight.size(3),
                     .outputs = outputs,
                     .bias = shift.data(),
                     .mask = data_of<const uint8_t>(mask),
                     .mask_stride = {mask.stride(0), mask.stride(1), mask.stride(2), mask.stride(3)},
                     .partial = data_of<const char>(partial),
                     .out = data_of<char>(out)};
  const double macs = double(out.numel()) * g.taps() * inputs / 4;  // a quarter of the mask, say
  const int64_t threads = threads_for(macs, kMacsPerThread);
  const Cut cut(c, threads);
  const int64_t blocks = cut.blocks(g), items = g.groups * cut.panels_of_group * blocks;
  parallel(threads, [&](int64_t t) {
    Worker worker(c, cut);
    for (const int64_t i : each(share_of(items, t, threads))) worker.run(i / blocks, i % blocks);
  });
}

// The number of a mask's selected elements, counted 8 at a time: 0.03 ms a million.
int64_t count_selected(const Tensor& mask) {
  const uint8_t* from = data_of<const uint8_t>(mask);
  const int64_t size = mask.numel(), whole = size / 8 * 8;
  int64_t count = 0;
  for (int64_t i = 0; i < whole; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, from + i, 8);
    count += __builtin_popcountll(eight);  // a bool is a 0 or a 1
  }
  for (int64_t i = whole; i < size; ++i) count += from[i] != 0;
  return count;
}

DYNOPS_CPU_OP(masked_conv)
DYNOPS_CPU_OP(count_selected)

}  // namespace
}  // namespace dynops::cpu
