// One job of a depthwise convolution on live channels.
#include "../engine/forward_pass.h"
#include "call.h"

namespace dynops::cpu {
namespace {

// Which live inputs are live outputs too, and where they stand in both lists.
struct Overlap {
  std::vector<int32_t> channel, in, out;

  Overlap(const ChannelList& inputs, const ChannelList& outputs) {
    for (int32_t i = 0, o = 0; i < inputs.count && o < outputs.count;) {
      if (inputs.index[i] == outputs.index[o]) {
        channel.push_back(inputs.index[i]);
        in.push_back(i);
        out.push_back(o);
      }
      const int32_t step = inputs.index[i] - outputs.index[o];
      i += step <= 0;
      o += step >= 0;
    }
  }
};

struct Scratch {
  Buffer x, spread, y, weight;
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

class DepthwiseJob {
 public:
  DepthwiseJob(const Call& c, const JobRange& range)
      : c_(c),
        range_(range),
        in_(c.in.whole(range.samples.begin)),
        out_(c.out.whole(range.samples.begin)),
        overlap_(in_, out_) {}

  void run();

 private:
  RowsAt read(Range lines);
  const char* weight();
  Affine affine() const;
  void write(Range rows, const RowsAt& computed, bool in_place);
  int64_t sample_rows(int64_t pixels) const { return c_.samples > 1 ? range_.samples.begin * pixels : 0; }

  const Call& c_;
  const JobRange range_;
  const ChannelList in_, out_;
  const Overlap overlap_;
  Scratch& s_ = Scratch::mine();
};

// The inputs of the live outputs side by side, zero where one is not live.
RowsAt DepthwiseJob::read(Range lines) {
  const int64_t element = c_.element(), first = lines.begin * c_.g.in_w, rows = lines.size() * c_.g.in_w;
  const char* map = c_.x.data + (sample_rows(c_.g.in_pixels())) * c_.x.stride;
  const int32_t shared = int32_t(overlap_.out.size());
  const bool all = shared == out_.count;
  const ChannelList from = c_.x.packed ? ChannelList{overlap_.in.data(), shared, in_.count}
                                       : ChannelList{overlap_.channel.data(), shared, in_.channels};
  if (all && from.prefix()) return RowsAt::from(map, c_.x.stride, 0);
  const int64_t stride = round_up(std::max(out_.count, 1) * element, 64);
  char* x = s_.x.at_least(rows * stride);
  kernels().compress(map + first * c_.x.stride, c_.x.stride, rows, from, c_.dtype, x, stride);
  if (all) return RowsAt::from(x, stride, first);
  char* spread = s_.spread.at_least(rows * stride);
  const ChannelList to{overlap_.out.data(), shared, out_.count};
  kernels().expand(x, stride, rows, to, c_.dtype, nullptr, 0, spread, stride, false);
  return RowsAt::from(spread, stride, first);
}

const char* DepthwiseJob::weight() {
  const int64_t row = out_.channels * 4, live = out_.count * 4;
  if (out_.full()) return c_.weight;
  char* to = s_.weight.at_least(c_.g.taps() * live);
  kernels().compress(c_.weight, row, c_.g.taps(), out_, Dtype::kFloat32, to, live);
  return to;
}

Affine DepthwiseJob::affine() const {
  Affine affine;
  affine.scale.assign(size_t(out_.count) + 64, 1.f);
  affine.shift.assign(size_t(out_.count) + 64, 0.f);
  for (int32_t j = 0; j < out_.count; ++j) {
    const int64_t channel = out_.index[j];
    const float scale = c_.scale ? c_.scale[range_.samples.begin * c_.outputs() + channel] : 1.f;
    affine.scale[size_t(j)] = scale;
    affine.shift[size_t(j)] = scale * c_.bias_of(range_.samples.begin, channel);
  }
  return affine;
}

void DepthwiseJob::run() {
  const Geometry& g = c_.g;
  const Range lines{c_.line_of(range_.units.begin), c_.line_of(range_.units.end)};
  const Range rows{lines.begin * g.out_w, lines.end * g.out_w};
  if (rows.size() <= 0) return;
  const bool in_place = c_.y.packed || out_.prefix();
  const int64_t stride = round_up(out_.count * c_.element(), 64);
  char* const y = c_.y.data + sample_rows(g.out_pixels()) * c_.y.stride;
  const RowsAt computed = in_place ? RowsAt::from(y, c_.y.stride, 0)
                                   : RowsAt::from(s_.y.at_least(rows.size() * stride), stride, rows.begin);
  if (out_.count) {
    const RowsAt x = read(input_lines(g, lines));
    Forward f{g,
              out_.count,
              out_.count,
              g.out_pixels(),
              c_.dtype,
              c_.pixels.data(),
              {g, x.row(0), x.stride, nullptr, c_.zero, false},
              affine(),
              c_.activation,
              weight(),
              nullptr,
              nullptr,
              nullptr,
              computed.row(0),
              true,
              false};
    f.out_stride = computed.stride;
    f.turned = c_.turned;
    f.each = true;
    for (const RowClass& rows_of : c_.classes) {
      const Range range = c_.of_class(rows_of, rows);
      ForwardPass(f, rows_of).run(range.begin, range.end, 0, 1);
    }
  }
  write_rows(c_, out_, sample_rows(g.out_pixels()) + rows.begin, rows.size(), computed.row(rows.begin),
             in_place ? 0 : stride, 0, true);
}

}  // namespace

void run_depthwise_job(const Call& c, const JobRange& range) { DepthwiseJob(c, range).run(); }

}  // namespace dynops::cpu
