// One job of a depthwise convolution on live channels.
#include "../engine/forward_pass.h"
#include "call.h"

namespace dynops::cpu {
namespace {

struct Scratch {
  Buffer x, spread, y, weight;
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

class DepthwiseJob {
 public:
  DepthwiseJob(const Call& c, const Job& job)
      : c_(c),
        job_(job),
        sample_(job.samples.begin),
        in_(c.in.whole(sample_)),
        out_(c.out.whole(sample_)),
        overlap_(in_, out_) {}

  void run();

 private:
  RowsAt read(Span lines);
  const char* weight();

  const Call& c_;
  const Job job_;
  const int64_t sample_;
  const ChannelList in_, out_;
  const Overlap overlap_;
  Scratch& s_ = Scratch::mine();
};

// The inputs of the live outputs side by side, zero where one is not live.
RowsAt DepthwiseJob::read(Span lines) {
  const int64_t element = c_.element(), first = lines.begin * c_.g.in_w, rows = lines.size() * c_.g.in_w;
  const char* map = c_.x_of(sample_);
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

void DepthwiseJob::run() {
  const Geometry& g = c_.g;
  const Span lines = c_.lines_of(job_.units), rows = c_.rows_of(lines);
  if (rows.size() <= 0) return;
  const bool in_place = c_.y.packed || out_.prefix();
  const int64_t stride = round_up(out_.count * c_.element(), 64);
  const RowsAt computed = in_place ? RowsAt::from(c_.y_of(sample_), c_.y.stride, 0)
                                   : RowsAt::from(s_.y.at_least(rows.size() * stride), stride, rows.begin);
  if (out_.count) {
    const RowsAt x = read(input_lines(g, lines));
    const Forward f{.g = g,
                    .in_channels = out_.count,
                    .out_channels = out_.count,
                    .rows = g.out_pixels(),
                    .dtype = c_.dtype,
                    .index = c_.pixels.data(),
                    .source = {.g = g, .x = x.row(0), .row_bytes = x.stride, .zero = c_.zero},
                    .affine = c_.affine_of(sample_, out_, 0, out_.count),
                    .activation = c_.activation,
                    .weight = weight(),
                    .out = computed.row(0),
                    .packed_out = true,
                    .out_stride = computed.stride,
                    .turned = c_.turned,
                    .each = true};
    RowTables tables;
    for (const RowClass& one : c_.classes) ForwardPass(f, one).run(tables, c_.of_class(one, rows), {0, 1});
  }
  write_rows(c_, out_, c_.first_row(sample_, g.out_pixels()) + rows.begin, rows.size(),
             computed.row(rows.begin), in_place ? 0 : stride, 0, true);
}

}  // namespace

void run_depthwise_job(const Call& c, const Job& job) { DepthwiseJob(c, job).run(); }

}  // namespace dynops::cpu
