// Conversion, and weights in the order of the GEMM. Included by kernels.inc.h.

// ------------------------------------------------------------------------------------ conversion

static void to_float(const char* from, Dtype dtype, int64_t n, float* to) {
  const int64_t element = size_of(dtype);
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const int left = left_of(n, i);
    store_floats(to + i, load(from + i * element, dtype, left), left);
  }
}

static void from_float(const float* from, int64_t n, Dtype dtype, char* to) {
  const int64_t element = size_of(dtype);
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const int left = left_of(n, i);
    store(to + i * element, load_floats(from + i, left), dtype, left);
  }
}

static void add_to(const char* from, Dtype dtype, int64_t n, float* to) {
  const int64_t element = size_of(dtype);
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const int left = left_of(n, i);
    const Vec sum = add(load(from + i * element, dtype, left), load_floats(to + i, left));
    store_floats(to + i, sum, left);
  }
}

// --------------------------------------------------------------------------------------- packing

template <Dtype kIn>
static void pack_columns_of(const PackColumns& p) {
  constexpr int kLanes = Vec::kLanes;
  constexpr int64_t kElement = size_of(kIn), kAhead = 512;
  for (int32_t first = 0; first < p.count; first += kLanes) {
    const int n = left_of(p.count, first);
    for (int32_t c = 0; c < p.width; c += kLanes) {
      const char* from = p.from + (c * p.step + first) * kElement;
      const int columns = p.columns - c;
      Vec m[kLanes];
      UNROLL for (int i = 0; i < kLanes; ++i) {
        // more rows than the hardware follows: 8 weights of 512 x 512 x 9 from memory, 6.8 ms instead of 8.6
        __builtin_prefetch(from + i * p.step * kElement + kAhead, 0, 2);
        const char* at = from + i * p.step * kElement;
        m[i] = i >= columns ? zero() : n == kLanes ? load_as<kIn>(at) : load_as<kIn>(at, n);
      }
      transpose(m);
      UNROLL for (int i = 0; i < kLanes; ++i) {
        if (i < n) store(p.to + int64_t(p.row[first + i]) * p.width + c, m[i]);
      }
    }
  }
}

static void pack_columns(const PackColumns& p) {
  with_any_type(p.dtype, [&](auto type) { pack_columns_of<type.value>(p); });
}

// G w of three values.
FORCE_INLINE void winograd_weights(Vec w0, Vec w1, Vec w2, Vec (&out)[4]) {
  const Vec half = broadcast(0.5f), sum = mul(add(w0, w2), half), middle = mul(w1, half);
  out[0] = w0;
  out[1] = add(sum, middle);
  out[2] = sub(sum, middle);
  out[3] = w2;
}

static void pack_winograd(const PackWinograd& p) {
  constexpr int kLanes = Vec::kLanes, kTaps = 9;
  for (int32_t c = 0; c < p.width; c += kLanes) {
    for (int64_t channel = 0; channel < p.channels; ++channel) {
      Vec w[(kTaps + kLanes - 1) / kLanes * kLanes];  // [tap], a column in each lane
      for (int t = 0; t < kTaps; t += kLanes) {
        Vec m[kLanes];
        UNROLL for (int i = 0; i < kLanes; ++i) {
          const float* from = p.from + ((c + i) * p.channels + channel) * kTaps + t;
          m[i] = c + i < p.columns ? load((const char*)from, Dtype::kFloat32, left_of(kTaps, t)) : zero();
        }
        transpose(m);
        UNROLL for (int i = 0; i < kLanes; ++i) w[t + i] = m[i];
      }
      Vec rows[3][4];  // [x][y] of G w
      UNROLL for (int x = 0; x < 3; ++x) winograd_weights(w[x], w[3 + x], w[6 + x], rows[x]);
      float* to = p.to + channel * p.width + c;
      UNROLL for (int y = 0; y < 4; ++y) {
        Vec out[4];
        winograd_weights(rows[0][y], rows[1][y], rows[2][y], out);
        UNROLL for (int x = 0; x < 4; ++x) store(to + (y * 4 + x) * p.position_stride, out[x]);
      }
    }
  }
}

static void pack_pairs(const float* from, int64_t pairs, int64_t width, char* to) {
  for (int64_t i = 0; i < pairs; ++i, from += 2 * width) {
    for (int64_t c = 0; c < width; c += Vec::kLanes, to += Vec::kLanes * 4) {
      Vec low, high;
      interleave(load(from + c), load(from + width + c), low, high);
      store_bf16(to, low);
      store_bf16(to + Vec::kLanes * 2, high);
    }
  }
}

template <Dtype kIn, bool kPairs>
static void pack_rows_of(const PackRows& p) {
  constexpr int64_t kElement = size_of(kIn);
  constexpr int kRows = kPairs ? 2 : 1;
  char* to = p.to;
  for (int32_t k = 0; k < p.count; k += kRows) {
    for (int32_t c = 0; c < p.width; c += Vec::kLanes, to += kRows * Vec::kLanes * (kPairs ? 2 : 4)) {
      const int n = left_of(p.columns, c);
      const char* from = p.from + (k * p.step + c) * kElement;
      const auto row = [&](int i) {
        if (n <= 0 || k + i >= p.count) return zero();
        const char* at = from + i * p.step * kElement;
        return n == Vec::kLanes ? load_as<kIn>(at) : load_as<kIn>(at, n);
      };
      if constexpr (kPairs) {
        Vec low, high;
        interleave(row(0), row(1), low, high);
        store_bf16(to, low);
        store_bf16(to + Vec::kLanes * 2, high);
      } else {
        store((float*)to, row(0));
      }
    }
  }
}

static void pack_rows(const PackRows& p) {
  with_any_type(p.dtype, [&](auto type) {
    p.pairs ? pack_rows_of<type.value, true>(p) : pack_rows_of<type.value, false>(p);
  });
}

// kOut outputs of one pass over the terms, which come from the L2 cache or beyond.
template <Dtype kType, int kOut>
static void mix_of(const Mixture& m, const float* share, char* const* to) {
  constexpr int kLanes = Vec::kLanes, kVectors = kOut > 1 ? 2 : 4;
  constexpr int64_t kElement = size_of(kType), kVector = kLanes * kElement;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= m.n; i += kVectors * kLanes) {
    Vec sum[kOut][kVectors];
    UNROLL for (int k = 0; k < kOut; ++k) { UNROLL for (int v = 0; v < kVectors; ++v) sum[k][v] = zero(); }
    for (int64_t e = 0; e < m.terms; ++e) {
      const char* at = m.from + e * m.stride + i * kElement;
      Vec in[kVectors];
      UNROLL for (int v = 0; v < kVectors; ++v) in[v] = load_as<kType>(at + v * kVector);
      UNROLL for (int k = 0; k < kOut; ++k) {
        const Vec s = broadcast(share[k * m.terms + e]);
        UNROLL for (int v = 0; v < kVectors; ++v) sum[k][v] = fma(s, in[v], sum[k][v]);
      }
    }
    UNROLL for (int k = 0; k < kOut; ++k) {
      UNROLL for (int v = 0; v < kVectors; ++v)
          store_as<kType>(to[k] + i * kElement + v * kVector, sum[k][v]);
    }
  }
  for (; i < m.n; i += kLanes) {
    const int left = left_of(m.n, i);
    for (int k = 0; k < kOut; ++k) {
      Vec sum = zero();
      for (int64_t e = 0; e < m.terms; ++e) {
        const Vec in = load(m.from + e * m.stride + i * kElement, kType, left);
        sum = fma(broadcast(share[k * m.terms + e]), in, sum);
      }
      store(to[k] + i * kElement, sum, kType, left);
    }
  }
}

template <Dtype kType>
static void mix_typed(const Mixture& m) {
  int64_t k = 0;
  for (; k + 4 <= m.outputs; k += 4) mix_of<kType, 4>(m, m.share + k * m.terms, m.to + k);
  if (k + 2 <= m.outputs) {
    mix_of<kType, 2>(m, m.share + k * m.terms, m.to + k);
    k += 2;
  }
  if (k < m.outputs) mix_of<kType, 1>(m, m.share + k * m.terms, m.to + k);
}

static void mix(const Mixture& m) {
  m.dtype == Dtype::kFloat32 ? mix_typed<Dtype::kFloat32>(m) : mix_typed<Dtype::kBFloat16>(m);
}
