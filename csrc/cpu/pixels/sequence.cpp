#include "sequence.h"

#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>

#include "../engine/parallel.h"

namespace dynops::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kSumRows = 64;  // rows in one sum of a mean: the error grows with it

// The places of values in one piece of memory; what is freed is taken again.
class Places {
 public:
  int64_t take(int64_t bytes) {
    bytes = round_up(std::max<int64_t>(bytes, 1), kAlignment);
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->size() >= bytes && (best == free_.end() || it->size() < best->size())) best = it;
    }
    if (best != free_.end()) {
      const int64_t at = best->begin;
      best->begin += bytes;
      if (best->size() == 0) free_.erase(best);
      return at;
    }
    size_ += bytes;
    return size_ - bytes;
  }
  void give(int64_t at, int64_t bytes) {
    Span span{at, at + round_up(std::max<int64_t>(bytes, 1), kAlignment)};
    for (auto it = free_.begin(); it != free_.end();) {
      if (it->end == span.begin || span.end == it->begin) {
        span = {std::min(it->begin, span.begin), std::max(it->end, span.end)};
        it = free_.erase(it);
      } else {
        ++it;
      }
    }
    free_.push_back(span);
  }
  int64_t size() const { return size_; }

 private:
  std::vector<Span> free_;
  int64_t size_ = 0;
};

struct Freeing {
  void operator()(char* p) const { std::free(p); }
};

// Runs row(r) for each row, on as many threads as the bytes are worth.
template <class Row>
void for_rows(int64_t rows, int64_t bytes_a_row, const Row& row) {
  parallel_shares(rows, threads_for(double(rows) * double(bytes_a_row), kCopyBytesPerThread), row);
}

// The rows of a sample.
Span rows_of(const PlanView& plan, int64_t sample) {
  const int64_t first = sample * plan.pixels;
  const int32_t* begin = std::lower_bound(plan.index, plan.index + plan.rows, int32_t(first));
  const int32_t* end = std::lower_bound(begin, plan.index + plan.rows, int32_t(first + plan.pixels));
  return {begin - plan.index, end - plan.index};
}

// sum[c] = sum of of(x[row][c], c) over some rows; `part` is working memory.
template <class Of>
void sum_rows(Span rows, const float* x, int64_t channels, std::vector<float>& part, float* sum,
              const Of& of) {
  part.resize(channels);
  std::fill_n(sum, channels, 0.f);
  for (int64_t a = rows.begin; a < rows.end; a += kSumRows) {
    std::fill(part.begin(), part.end(), 0.f);
    for (int64_t i = a; i < std::min(rows.end, a + kSumRows); ++i) {
      const float* row = x + i * channels;
      for (int64_t c = 0; c < channels; ++c) part[c] += of(row[c], c);
    }
    for (int64_t c = 0; c < channels; ++c) sum[c] += part[c];
  }
}

void mean(const PlanView& in, const PlanView& out, const float* x, int64_t channels, float* to) {
  std::vector<float> part;
  for (int64_t r = 0; r < out.rows; ++r) {
    const Span rows = rows_of(in, out.index[r]);  // one pixel a sample
    float* sum = to + r * channels;
    sum_rows(rows, x, channels, part, sum, [](float v, int64_t) { return v; });
    const float share = 1.f / float(std::max<int64_t>(rows.size(), 1));
    for (int64_t c = 0; c < channels; ++c) sum[c] *= share;
  }
}

void response_norm(const SequenceStep& step, const PlanView& plan, const float* x, int64_t channels,
                   float* to) {
  std::vector<float> part, scale(channels);
  for (int64_t a = 0; a < plan.rows;) {
    const Span rows = rows_of(plan, plan.index[a] / plan.pixels);
    sum_rows(rows, x, channels, part, scale.data(), [](float v, int64_t) { return v * v; });
    double sum = 0;
    for (float& v : scale) sum += v = std::sqrt(v);
    const float share = 1.f / (float(sum / double(channels)) + float(step.eps));
    for (int64_t c = 0; c < channels; ++c) scale[c] *= share;
    for_rows(rows.size(), 8 * channels, [&](int64_t r) {
      const float* row = x + (rows.begin + r) * channels;
      float* z = to + (rows.begin + r) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        z[c] = row[c] + (step.beta[c] + step.gamma[c] * (row[c] * scale[c]));
      }
    });
    a = rows.end;
  }
}

// of(a, b) of two values; b may have one pixel a sample, where it has none it is zero.
template <class Of>
void combine(const PlanView& plan, const PlanView& other, const float* a, const float* b, int64_t channels,
             float* to, const Of& of) {
  const bool spread = other.index != plan.index;
  const std::vector<float> zero(spread ? channels : 0, 0.f);
  for_rows(plan.rows, 8 * channels, [&](int64_t r) {
    const int64_t row = spread ? other.inverse[plan.index[r] / plan.pixels] : r;
    const float *x = a + r * channels, *y = row < 0 ? zero.data() : b + row * channels;
    float* z = to + r * channels;
    for (int64_t c = 0; c < channels; ++c) z[c] = of(x[c], y[c]);
  });
}

// Windows of rows; an inactive pixel inside the map is zero, one outside of it does not count.
template <StepKind kKind>
void pool(const Geometry& g, const PlanView& in, const PlanView& out, const float* x, int64_t channels,
          float* to) {
  constexpr bool kMax = kKind == StepKind::kMaxPool;
  const std::vector<float> zero(channels, 0.f);
  for_rows(out.rows, 4 * channels * g.taps(), [&](int64_t r) {
    const Pixel p = g.out_pixel(out.index[r]);
    float* z = to + r * channels;
    std::fill_n(z, channels, kMax ? -std::numeric_limits<float>::infinity() : 0.f);
    int32_t inside = 0;
    for (int32_t y = 0; y < g.kernel_h; ++y) {
      for (int32_t s = 0; s < g.kernel_w; ++s) {
        const int32_t q = g.in_pixel(p, y, s);
        if (q < 0) continue;
        ++inside;
        const float* v = in.inverse[q] < 0 ? zero.data() : x + int64_t(in.inverse[q]) * channels;
        for (int64_t c = 0; c < channels; ++c) {
          if constexpr (kMax) {
            z[c] = z[c] >= v[c] || z[c] != z[c] ? z[c] : v[c];  // a NaN stays
          } else {
            z[c] += v[c];
          }
        }
      }
    }
    if constexpr (!kMax) {
      const float share = 1.f / float(kKind == StepKind::kMeanPool ? int32_t(g.taps()) : std::max(inside, 1));
      for (int64_t c = 0; c < channels; ++c) z[c] *= share;
    }
  });
}

// Means and variances of a sample's groups in two passes, as rows of the sample's channels.
void group_norm(const SequenceStep& step, const PlanView& plan, const float* x, int64_t channels, float* to) {
  const int64_t groups = step.channels[0], width = channels / groups;
  std::vector<float> part, sums(channels), scale(channels), mean(channels);
  for (int64_t a = 0; a < plan.rows;) {
    const Span rows = rows_of(plan, plan.index[a] / plan.pixels);
    const double count = double(rows.size()) * double(width);
    const auto of_group = [&](int64_t group) {
      double sum = 0;
      for (int64_t c = group * width; c < (group + 1) * width; ++c) sum += sums[c];
      return sum / count;
    };
    sum_rows(rows, x, channels, part, sums.data(), [](float v, int64_t) { return v; });
    for (int64_t c = 0; c < channels; ++c) mean[c] = c % width ? mean[c - 1] : float(of_group(c / width));
    sum_rows(rows, x, channels, part, sums.data(),
             [&](float v, int64_t c) { return (v - mean[c]) * (v - mean[c]); });
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] = c % width ? scale[c - 1] : float(1 / std::sqrt(of_group(c / width) + step.eps));
    }
    for (int64_t c = 0; c < channels; ++c) sums[c] = step.gamma ? scale[c] * step.gamma[c] : scale[c];
    for_rows(rows.size(), 8 * channels, [&](int64_t r) {
      const float* row = x + (rows.begin + r) * channels;
      float* z = to + (rows.begin + r) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        z[c] = (row[c] - mean[c]) * sums[c] + (step.beta ? step.beta[c] : 0.f);
      }
    });
    a = rows.end;
  }
}

// Runs of neighbours are copied together: a half of the channels is one, a shuffle has none.
void take(const std::vector<int64_t>& channels, int64_t rows, const float* x, int64_t in_channels,
          float* to) {
  const int64_t count = int64_t(channels.size());
  for_rows(rows, 8 * count, [&](int64_t r) {
    const float* from = x + r * in_channels;
    float* z = to + r * count;
    for (int64_t c = 0; c < count;) {
      int64_t end = c + 1;
      while (end < count && channels[end] == channels[end - 1] + 1) ++end;
      std::copy_n(from + channels[c], end - c, z + c);
      c = end;
    }
  });
}

void layer_norm(const SequenceStep& step, int64_t rows, const float* x, int64_t channels, float* to) {
  for_rows(rows, 16 * channels, [&](int64_t r) {
    const float* row = x + r * channels;
    float* z = to + r * channels;
    double sum = 0, squares = 0;
    for (int64_t begin = 0; begin < channels; begin += kSumRows) {
      float part = 0;
      for (int64_t c = begin; c < std::min(channels, begin + kSumRows); ++c) part += row[c];
      sum += part;
    }
    const float mean = float(sum / double(channels));
    for (int64_t begin = 0; begin < channels; begin += kSumRows) {
      float part = 0;
      for (int64_t c = begin; c < std::min(channels, begin + kSumRows); ++c) {
        part += (row[c] - mean) * (row[c] - mean);
      }
      squares += part;
    }
    const float scale = float(1 / std::sqrt(squares / double(channels) + step.eps));
    for (int64_t c = 0; c < channels; ++c) {
      const float normed = (row[c] - mean) * scale;
      z[c] = (step.gamma ? normed * step.gamma[c] : normed) + (step.beta ? step.beta[c] : 0.f);
    }
  });
}

void nearest(const Geometry& g, const PlanView& in, const PlanView& out, const float* x, int64_t channels,
             float* to) {
  const int32_t fh = int32_t(g.out_h / g.in_h), fw = int32_t(g.out_w / g.in_w);
  for_rows(out.rows, 8 * channels, [&](int64_t r) {
    const Pixel p = g.out_pixel(out.index[r]);
    const int32_t row = in.inverse[(p.n * int32_t(g.in_h) + p.y / fh) * int32_t(g.in_w) + p.x / fw];
    if (row < 0) {
      std::fill_n(to + r * channels, channels, 0.f);
    } else {
      std::copy_n(x + int64_t(row) * channels, channels, to + r * channels);
    }
  });
}

void bilinear(const SequenceStep& step, const PlanView& in, const PlanView& out, const float* x,
              int64_t channels, float* to) {
  const Geometry& g = step.g;
  const std::vector<float> zero(channels, 0.f);
  for_rows(out.rows, 20 * channels, [&](int64_t r) {
    const Pixel p = g.out_pixel(out.index[r]);
    const int64_t top = step.channels[p.y], left = step.channels[g.out_h + p.x];
    const int64_t bottom = std::min<int64_t>(top + 1, g.in_h - 1),
                  right = std::min<int64_t>(left + 1, g.in_w - 1);
    const auto at = [&](int64_t i, int64_t j) {
      const int32_t row = in.inverse[(p.n * g.in_h + i) * g.in_w + j];
      return row < 0 ? zero.data() : x + int64_t(row) * channels;
    };
    const float *a = at(top, left), *b = at(top, right), *c = at(bottom, left), *d = at(bottom, right);
    const float down = step.gamma[p.y], across = step.beta[p.x];
    float* z = to + r * channels;
    for (int64_t i = 0; i < channels; ++i) {
      const float upper = a[i] * (1.f - across) + b[i] * across;
      const float lower = c[i] * (1.f - across) + d[i] * across;
      z[i] = upper * (1.f - down) + lower * down;
    }
  });
}

}  // namespace

void Sequence::run_step(const SequenceStep& step, const std::vector<PlanView>& plans,
                        const std::vector<char*>& at) const {
  const int64_t a = step.inputs[0], b = step.inputs.size() > 1 ? step.inputs[1] : -1;
  const PlanView &in = plans[values[a].plan], &out = plans[values[step.out].plan];
  const int64_t channels = values[step.out].channels, elements = out.rows * channels;
  const auto floats = [&](int64_t value) { return reinterpret_cast<float*>(at[value]); };
  float* to = floats(step.out);
  const float *x = floats(a), *y = b < 0 ? nullptr : floats(b);
  switch (step.kind) {
    case StepKind::kConv:
    case StepKind::kEach: {
      const bool pointwise = step.conv->pointwise(), quads = step.conv->winograd();
      return step.conv->run({.x = at[a],
                             .index = out.index,
                             .rows = out.rows,
                             .source = pointwise ? nullptr : in.inverse,
                             .residual = b < 0 ? nullptr : at[b],
                             .quads = quads ? out.quads : nullptr,
                             .tiles = quads ? out.tiles : 0,
                             .out = at[step.out]});
    }
    case StepKind::kMean:
      return mean(in, out, x, channels, to);
    case StepKind::kSum:
      return combine(out, plans[values[b].plan], x, y, channels, to, std::plus<float>());
    case StepKind::kProduct:
      return combine(out, plans[values[b].plan], x, y, channels, to, std::multiplies<float>());
    case StepKind::kSigmoid:
      for (int64_t i = 0; i < elements; ++i) to[i] = 1.f / (1.f + std::exp(-x[i]));
      return;
    case StepKind::kHardsigmoid:
      for (int64_t i = 0; i < elements; ++i) to[i] = std::min(std::max(x[i] + 3.f, 0.f), 6.f) / 6.f;
      return;
    case StepKind::kCat: {
      int64_t begin = 0;
      for (const int64_t value : step.inputs) {
        const int64_t own = values[value].channels;
        const float* part = floats(value);
        for_rows(out.rows, 8 * own,
                 [&](int64_t r) { std::copy_n(part + r * own, own, to + r * channels + begin); });
        begin += own;
      }
      return;
    }
    case StepKind::kMaxPool:
      return pool<StepKind::kMaxPool>(step.g, in, out, x, channels, to);
    case StepKind::kMeanPool:
      return pool<StepKind::kMeanPool>(step.g, in, out, x, channels, to);
    case StepKind::kInnerMeanPool:
      return pool<StepKind::kInnerMeanPool>(step.g, in, out, x, channels, to);
    case StepKind::kNearest:
      return nearest(step.g, in, out, x, channels, to);
    case StepKind::kBilinear:
      return bilinear(step, in, out, x, channels, to);
    case StepKind::kLayerNorm:
      return layer_norm(step, out.rows, x, channels, to);
    case StepKind::kGroupNorm:
      return group_norm(step, out, x, channels, to);
    case StepKind::kResponseNorm:
      return response_norm(step, out, x, channels, to);
    case StepKind::kTake:
      return take(step.channels, out.rows, x, values[a].channels, to);
  }
}

void Sequence::run(const std::vector<PlanView>& plans, const std::vector<const char*>& from,
                   const std::vector<char*>& to) const {
  std::vector<int64_t> place(values.size(), -1);
  std::vector<char*> at(values.size(), nullptr);
  for (size_t i = 0; i < inputs.size(); ++i) at[inputs[i]] = const_cast<char*>(from[i]);
  for (size_t i = 0; i < outputs.size(); ++i) at[outputs[i]] = to[i];
  const auto bytes = [&](int64_t v) { return plans[values[v].plan].rows * values[v].channels * int64_t(4); };
  Places places;
  for (const SequenceStep& step : steps) {
    if (!at[step.out]) place[step.out] = places.take(bytes(step.out));
    for (const int64_t value : step.freed) {
      if (place[value] >= 0) places.give(place[value], bytes(value));
    }
  }
  const int64_t whole = round_up(std::max<int64_t>(places.size(), 1), kAlignment);
  const std::unique_ptr<char, Freeing> memory(static_cast<char*>(std::aligned_alloc(kAlignment, whole)));
  STD_TORCH_CHECK(memory, "sequence: no memory for ", whole, " bytes of rows");
  for (size_t v = 0; v < values.size(); ++v) {
    if (place[v] >= 0) at[v] = memory.get() + place[v];
  }
  for (const SequenceStep& step : steps) run_step(step, plans, at);
}

}  // namespace dynops::cpu
