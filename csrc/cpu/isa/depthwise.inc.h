// Depthwise convolutions: forward and both gradients. Included by kernels.inc.h.

FORCE_INLINE void finish_depthwise(const Depthwise& d, const RowBlock& rows, int row, Vec acc, int64_t c,
                                   int n) {
  finish(d, acc, load(d.scale + c), load(d.shift + c), rows, row, c * size_of(d.out), n);
}

// A few rows: where they are read ([height][segment]) and written.
struct DepthwiseTile {
  const char* const* in;
  int first_row, height;
};

// A channel never meets another, so the accumulators run along channels. NV vectors of all taps' weights stay
// in registers (9 taps x 2 vectors of 32) while the rows pass by. A vector has three sums. One chain of nine
// FMAs took 5.7 ns a vector, these take 4.6, and the loads of the taps alone 2.5.
template <Dtype kIn, int NV, bool kPlain>
FORCE_INLINE void depthwise_9(const Depthwise& d, const RowBlock& rows, const DepthwiseTile& tile,
                              int64_t channel) {
  constexpr int kTaps = 9, kChains = 3;
  constexpr int64_t kElement = size_of(kIn), kVector = Vec::kLanes * kElement;
  Vec weight[kTaps][NV], scale[NV], shift[NV];
  UNROLL for (int s = 0; s < kTaps; ++s) {
    UNROLL for (int v = 0; v < NV; ++v) {
      weight[s][v] = load(d.weight + d.taps[s] * d.channels + channel + v * Vec::kLanes);
    }
  }
  UNROLL for (int v = 0; v < NV; ++v) {
    scale[v] = load(d.scale + channel + v * Vec::kLanes);
    shift[v] = load(d.shift + channel + v * Vec::kLanes);
  }
  const char* const* in = tile.in;
  char* const* out = rows.out + tile.first_row;
  const int64_t byte = channel * kElement;
  for (int i = 0; i < tile.height; ++i, in += kTaps) {
    if (d.prefetch_rows) {  // the bottom line of taps; those above it were read with the rows above
      const char* const* next =
          in + (tile.first_row + i + d.prefetch_rows < rows.rows ? d.prefetch_rows * kTaps : 0);
      UNROLL for (int s = kTaps - 3; s < kTaps; ++s) {
        UNROLL for (int v = 0; v < NV; ++v) __builtin_prefetch(next[s] + byte + v * kVector, 0, 3);
      }
    }
    Vec acc[kChains][NV];
    UNROLL for (int s = 0; s < kTaps; ++s) {
      UNROLL for (int v = 0; v < NV; ++v) {
        const Vec x = load_as<kIn>(in[s] + byte + v * kVector);
        Vec& sum = acc[s % kChains][v];
        sum = s < kChains ? mul(x, weight[s][v]) : fma(x, weight[s][v], sum);
      }
    }
    UNROLL for (int v = 0; v < NV; ++v) {
      const Vec sum = add(add(acc[0][v], acc[1][v]), acc[2][v]);
      if constexpr (kPlain) {
        store_as<kIn>(out[i] + byte + v * kVector, fma(sum, scale[v], shift[v]));
      } else {
        finish_depthwise(d, rows, tile.first_row + i, sum, channel + v * Vec::kLanes, Vec::kLanes);
      }
    }
  }
}

// Any number of taps: NV vectors side by side hide the FMA's latency. `n`: the last channels, less than one.
template <Dtype kIn, int NV>
FORCE_INLINE void depthwise_any(const Depthwise& d, const RowBlock& rows, const DepthwiseTile& tile,
                                int64_t channel, int n = Vec::kLanes) {
  constexpr int64_t kElement = size_of(kIn);
  for (int i = 0; i < tile.height; ++i) {
    const char* const* in = tile.in + int64_t(i) * d.segments;
    Vec acc[NV];
    UNROLL for (int v = 0; v < NV; ++v) acc[v] = zero();
    for (int s = 0; s < d.segments; ++s) {
      const float* w = d.weight + d.taps[s] * d.channels + channel;
      UNROLL for (int v = 0; v < NV; ++v) {
        const Vec x = load(in[s] + (channel + v * Vec::kLanes) * kElement, kIn, n);
        acc[v] = fma(x, load_floats(w + v * Vec::kLanes, n), acc[v]);
      }
    }
    UNROLL for (int v = 0; v < NV; ++v) {
      finish_depthwise(d, rows, tile.first_row + i, acc[v], channel + v * Vec::kLanes, n);
    }
  }
}

// Tile by tile: the input pixels of 24 rows stay in the L1 cache while all channels are computed.
template <Dtype kIn, bool kPlain>
static void depthwise_typed(const Depthwise& d, const RowBlock& rows) {
  constexpr int kLanes = Vec::kLanes, kHeight = 2 * kTileRows;
  for (int first = 0; first < rows.rows; first += kHeight) {
    const DepthwiseTile tile{rows.in + int64_t(first) * d.segments, first,
                             rows.rows - first < kHeight ? rows.rows - first : kHeight};
    int64_t c = 0;
    if (d.segments == 9) {
      for (; c + 2 * kLanes <= d.channels; c += 2 * kLanes) depthwise_9<kIn, 2, kPlain>(d, rows, tile, c);
      for (; c + kLanes <= d.channels; c += kLanes) depthwise_9<kIn, 1, kPlain>(d, rows, tile, c);
    }
    for (; c + 4 * kLanes <= d.channels; c += 4 * kLanes) depthwise_any<kIn, 4>(d, rows, tile, c);
    for (; c + kLanes <= d.channels; c += kLanes) depthwise_any<kIn, 1>(d, rows, tile, c);
    if (c < d.channels) depthwise_any<kIn, 1>(d, rows, tile, c, left_of(d.channels, c));
  }
}

template <Dtype kIn>
static void depthwise_of(const Depthwise& d, const RowBlock& rows) {
  if (!rows.gate && !rows.residual && d.activation == Activation::kNone)
    return depthwise_typed<kIn, true>(d, rows);
  depthwise_typed<kIn, false>(d, rows);
}

static void depthwise(const Depthwise& d, const RowBlock& rows) {
  with_float_type(d.in, [&](auto type) { depthwise_of<type.value>(d, rows); });
}

template <Dtype kType, int NV>
FORCE_INLINE void pairs_columns(const DepthwisePairs& d, int row, int64_t channel, int n) {
  constexpr int64_t kElement = size_of(kType);
  const char* const* in = d.in + int64_t(row) * d.taps;
  const int32_t* tap = d.tap + int64_t(row) * d.taps;
  Vec acc[NV];
  UNROLL for (int v = 0; v < NV; ++v) acc[v] = zero();
  for (int j = 0; j < d.pairs[row]; ++j) {
    const float* w = d.weight + tap[j] * d.channels + channel;
    UNROLL for (int v = 0; v < NV; ++v) {
      const int64_t c = v * Vec::kLanes;
      acc[v] = fma(load(in[j] + (channel + c) * kElement, kType, n), load_floats(w + c, n), acc[v]);
    }
  }
  UNROLL for (int v = 0; v < NV; ++v) {
    store(d.out[row] + (channel + v * Vec::kLanes) * kElement, acc[v], kType, n);
  }
}

template <Dtype kType>
static void depthwise_pairs_typed(const DepthwisePairs& d) {
  constexpr int kLanes = Vec::kLanes;
  for (int i = 0; i < d.rows; ++i) {
    if (!d.out[i]) continue;
    int64_t c = 0;
    for (; c + 4 * kLanes <= d.channels; c += 4 * kLanes) pairs_columns<kType, 4>(d, i, c, kLanes);
    for (; c + kLanes <= d.channels; c += kLanes) pairs_columns<kType, 1>(d, i, c, kLanes);
    if (c < d.channels) pairs_columns<kType, 1>(d, i, c, left_of(d.channels, c));
  }
}

static void depthwise_pairs(const DepthwisePairs& d) {
  with_float_type(d.dtype, [&](auto type) { depthwise_pairs_typed<type.value>(d); });
}

// Adds kTaps x NV sums, kept in registers over all rows: a gradient is loaded once for all taps. `n`: of the
// last channels, less than a vector.
template <Dtype kIn, int kTaps, int NV>
FORCE_INLINE void depthwise_outer(int rows, int segments, const char* const* x, const char* const* grad,
                                  int64_t channel, int64_t channels, float* dw, int n = Vec::kLanes) {
  constexpr int64_t kElement = size_of(kIn), kVector = Vec::kLanes * kElement;
  const int64_t byte = channel * kElement;
  Vec acc[kTaps][NV];
  UNROLL for (int t = 0; t < kTaps; ++t) { UNROLL for (int v = 0; v < NV; ++v) acc[t][v] = zero(); }
  for (int k = 0; k < rows; ++k, x += segments) {
    Vec dy[NV];
    UNROLL for (int v = 0; v < NV; ++v) dy[v] = load(grad[k] + byte + v * kVector, kIn, n);
    UNROLL for (int t = 0; t < kTaps; ++t) {
      UNROLL for (int v = 0; v < NV; ++v) acc[t][v] =
          fma(load(x[t] + byte + v * kVector, kIn, n), dy[v], acc[t][v]);
    }
  }
  UNROLL for (int t = 0; t < kTaps; ++t) {
    UNROLL for (int v = 0; v < NV; ++v) {
      float* to = dw + t * channels + channel + v * Vec::kLanes;
      store_floats(to, add(acc[t][v], load_floats(to, n)), n);
    }
  }
}

template <Dtype kIn, int kTaps>
static void depthwise_taps(int32_t rows, int32_t segments, const char* const* x, const char* const* grad,
                           int64_t channels, float* dw) {
  constexpr int kLanes = Vec::kLanes;
  int64_t c = 0;
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes)
    depthwise_outer<kIn, kTaps, 2>(rows, segments, x, grad, c, channels, dw);
  for (; c + kLanes <= channels; c += kLanes)
    depthwise_outer<kIn, kTaps, 1>(rows, segments, x, grad, c, channels, dw);
  if (c < channels)
    depthwise_outer<kIn, kTaps, 1>(rows, segments, x, grad, c, channels, dw, left_of(channels, c));
}

static void depthwise_weight_grad(int32_t rows, int32_t segments, const char* const* x,
                                  const char* const* grad, Dtype dtype, int64_t channels, float* dw) {
  with_float_type(dtype, [&](auto type) {
    int32_t s = 0;
    for (; s + 9 <= segments; s += 9)
      depthwise_taps<type.value, 9>(rows, segments, x + s, grad, channels, dw + s * channels);
    for (; s < segments; ++s)
      depthwise_taps<type.value, 1>(rows, segments, x + s, grad, channels, dw + s * channels);
  });
}
