// Rows of experts: products straight on a weight's rows, and the steps after. Included by kernels.inc.h.

// ------------------------------------------------------------------------------ dots of whole rows

// A tile of 6 x 4 sums loads 10 vectors for 24 products, and leaves 8 of 32 registers; 2 x 4 of 16.
constexpr int kDotColumns = 4;
constexpr int kDotTileRows = kPanelVectors == 2 ? 6 : 2;

// Weights along the depth, as DepthVector<kX> multiplies them.
template <Dtype kX, Dtype kW>
struct DepthWeight {
  static constexpr int kElement = size_of(kW);
  FORCE_INLINE DepthVector<kX> whole(const char* p) { return {load_as<kW>(p)}; }
  FORCE_INLINE DepthVector<kX> tail(const char* p, int n) { return {load_as<kW>(p, n)}; }
};

#if defined(DYNOPS_ISA_BF16)
template <>
struct DepthWeight<Dtype::kBFloat16, Dtype::kBFloat16> : DepthVector<Dtype::kBFloat16> {};

template <>
struct DepthWeight<Dtype::kBFloat16, Dtype::kInt8> {  // which bfloat16 holds exactly
  static constexpr int kElement = 1;
  FORCE_INLINE DepthVector<Dtype::kBFloat16> join(Vec low, Vec high) {
    return {(__m512i)_mm512_cvtne2ps_pbh(high.v, low.v)};
  }
  FORCE_INLINE DepthVector<Dtype::kBFloat16> whole(const char* p) {
    return join(load_i8(p), load_i8(p + 16));
  }
  FORCE_INLINE DepthVector<Dtype::kBFloat16> tail(const char* p, int n) {
    return join(load_i8(p, n), n > 16 ? load_i8(p + 16, n - 16) : zero());
  }
};
#endif

// The memory that a tile reads: MR rows of x and kDotColumns rows of the weight, and rows ahead to ask for.
struct DotTile {
  const char* const* x;
  const char* weight[kDotColumns];
  int depth;
  const char* ahead;
  int64_t ahead_stride;
  int ahead_rows;
};

// acc[i][c] += the products of one vector of each row: of all its elements, or of n.
template <class X, class W, bool kWhole, int MR>
FORCE_INLINE void multiply_depth(Vec (&acc)[MR][kDotColumns], const char* const (&x)[MR],
                                 const char* const (&weight)[kDotColumns], int64_t k, int n = X::kLanes) {
  X w[kDotColumns];
  UNROLL for (int c = 0; c < kDotColumns; ++c) {
    const char* at = weight[c] + k * W::kElement;
    w[c] = kWhole ? W::whole(at) : W::tail(at, n);
  }
  UNROLL for (int i = 0; i < MR; ++i) {
    const char* at = x[i] + k * X::kElement;
    const X row = kWhole ? X::whole(at) : X::tail(at, n);
    UNROLL for (int c = 0; c < kDotColumns; ++c) acc[i][c] = X::multiply(row, w[c], acc[i][c]);
  }
}

// sums[i][c] of MR rows; those of an odd last row are followed by as many that mean nothing.
template <Dtype kX, Dtype kW, int MR>
static __attribute__((noinline)) void row_dots_tile(const DotTile& t, float* sums) {
  using X = DepthVector<kX>;
  using W = DepthWeight<kX, kW>;
  constexpr int kStep = X::kLanes, kUnroll = 4;
  constexpr int kLine = 64 / W::kElement;  // depth of a cache line of the weight
  const char *x[MR], *weight[kDotColumns];
  UNROLL for (int i = 0; i < MR; ++i) x[i] = t.x[i];
  UNROLL for (int c = 0; c < kDotColumns; ++c) weight[c] = t.weight[c];
  Vec acc[MR][kDotColumns];
  UNROLL for (int i = 0; i < MR; ++i) { UNROLL for (int c = 0; c < kDotColumns; ++c) acc[i][c] = zero(); }
  KeptSums<MR, kDotColumns> kept;
  int64_t k = 0, full = kSumLength * kStep;  // full: where these sums are long enough
  for (; k + kUnroll * kStep <= t.depth; k += kUnroll * kStep) {
    if (k == full) {
      kept.take(acc);
      full += kSumLength * kStep;
    }
    for (int r = 0; r < t.ahead_rows; ++r) {
      const char* ahead = t.ahead + r * t.ahead_stride + k * W::kElement;
      UNROLL for (int u = 0; u < kUnroll * kStep; u += kLine)
          __builtin_prefetch(ahead + u * W::kElement, 0, 2);
    }
    UNROLL for (int u = 0; u < kUnroll; ++u) multiply_depth<X, W, true>(acc, x, weight, k + u * kStep);
  }
  for (; k < t.depth; k += kStep) {
    const int n = t.depth - k < kStep ? int(t.depth - k) : kStep;
    multiply_depth<X, W, false>(acc, x, weight, k, n);
  }
  if (!kept.empty) kept.add_to(acc);
  UNROLL for (int i = 0; i < MR; i += 2) {
    constexpr int kLast = MR - 1;
    Vec two[kDotRows];
    UNROLL for (int c = 0; c < kDotColumns; ++c) {
      two[c] = acc[i][c];
      two[kDotColumns + c] = acc[i < kLast ? i + 1 : i][c];
    }
    lane_sums(two, sums + i * kDotColumns);
  }
}

// Four rows of the weight at a time meet all rows of x, while the next four are asked for.
template <Dtype kX, Dtype kW>
static void row_dots_typed(const RowDots& d) {
  using Tile = void (*)(const DotTile&, float*);
  constexpr int kMost = kDotTileRows;
  static constexpr auto tile =
      by_height<kMost>([]<int kRows>() -> Tile { return row_dots_tile<kX, kW, kRows>; });
  const int tiles = (d.rows + kMost - 1) / kMost;
  for (int column = 0; column < d.columns; column += kDotColumns) {
    const int columns = d.columns - column < kDotColumns ? d.columns - column : kDotColumns;
    const int following = d.columns - column - columns;
    DotTile t{d.x, {}, d.depth, d.next, d.weight_stride, 0};
    for (int c = 0; c < kDotColumns; ++c) {
      t.weight[c] = d.weight + (column + (c < columns ? c : 0)) * d.weight_stride;
    }
    const char* ahead = following ? d.weight + (column + columns) * d.weight_stride : d.next;
    const int wanted = !ahead ? 0 : following && following < kDotColumns ? following : kDotColumns;
    for (int i = 0, row = 0; i < tiles; ++i) {  // of nearly equal height
      const int height = d.rows / tiles + (i < d.rows % tiles);
      const int begin = wanted * i / tiles, end = wanted * (i + 1) / tiles;
      t.x = d.x + row;
      t.ahead = ahead + begin * d.weight_stride;
      t.ahead_rows = end - begin;
      float sums[kMost * kDotColumns + kDotRows];
      tile[height - 1](t, sums);
      for (int r = 0; r < height; ++r) {
        float* to = d.sums + (row + r) * d.sums_stride + column;
        for (int c = 0; c < columns; ++c) to[c] = sums[r * kDotColumns + c];
      }
      row += height;
    }
  }
}

static void row_dots(const RowDots& d) {
#if defined(DYNOPS_ISA_BF16)
  if (d.x_dtype == Dtype::kBFloat16) {
    if (d.weight_dtype == Dtype::kInt8) return row_dots_typed<Dtype::kBFloat16, Dtype::kInt8>(d);
    return row_dots_typed<Dtype::kBFloat16, Dtype::kBFloat16>(d);
  }
#endif
  with_any_type(d.weight_dtype, [&](auto type) { row_dots_typed<Dtype::kFloat32, type.value>(d); });
}

// ------------------------------------------------------------------------- after a product

// Rows first: columns first would touch a line of each row in turn, and rows 4 KB apart share an L1 set.
static void finish_rows(const FinishRows& f) {
  const bool affine = f.scale || f.bias || f.activation != Activation::kNone;
  for (int i = 0; i < f.rows; ++i) {
    const float* sums = f.sums + i * f.sums_stride;
    const Vec weight = broadcast(f.weight ? f.weight[i] : 1.f);
    for (int64_t c = 0; c < f.columns; c += Vec::kLanes) {
      const int n = left_of(f.columns, c);
      char* out = f.out[i] + c * size_of(f.dtype);
      Vec y = load_floats(sums + c, n);
      if (affine) {
        const Vec scale = f.scale ? load_floats(f.scale + c, n) : broadcast(1.f);
        const Vec bias = f.bias ? load(f.bias + c * size_of(f.bias_dtype), f.bias_dtype, n) : zero();
        y = activate(fma(y, scale, bias), f.activation);
      }
      if (f.weight) y = mul(y, weight);
      if (f.add) y = add(y, load_floats((const float*)out, n));
      store(out, y, f.dtype, n);
    }
  }
}

// ------------------------------------------------- between the products: activation and its gradient

// A vector of gates and one of ups, from column c on.
FORCE_INLINE void load_halves(const Glu& g, const char* z, int64_t c, Vec& gate, Vec& up) {
  const int64_t element = size_of(g.in);
  const int left = left_of(g.n, c);
  if (!g.interleaved) {
    gate = load(z + c * element, g.in, left);
    up = load(z + (g.up + c) * element, g.in, left);
    return;
  }
  const int second = 2 * left - Vec::kLanes;
  const Vec low = load(z + 2 * c * element, g.in, 2 * left);
  const Vec high = second > 0 ? load(z + (2 * c + Vec::kLanes) * element, g.in, second) : zero();
  deinterleave(low, high, gate, up);
}

FORCE_INLINE void store_halves(const Glu& g, char* z, int64_t c, Vec gate, Vec up) {
  const int64_t element = size_of(g.in);
  const int left = left_of(g.n, c);
  if (!g.interleaved) {
    store(z + c * element, gate, g.in, left);
    store(z + (g.up + c) * element, up, g.in, left);
    return;
  }
  const int second = 2 * left - Vec::kLanes;
  Vec low, high;
  interleave(gate, up, low, high);
  store(z + 2 * c * element, low, g.in, 2 * left);
  if (second > 0) store(z + (2 * c + Vec::kLanes) * element, high, g.in, second);
}

FORCE_INLINE Vec clamp(Vec x, Vec limit) { return max_of(sub(zero(), limit), min_of(limit, x)); }

static void glu(const Glu& g, const char* z, char* h) {
  const Vec one = broadcast(1.f), limit = broadcast(g.limit), alpha = broadcast(g.alpha);
  for (int64_t c = 0; c < g.n; c += Vec::kLanes) {
    const int left = left_of(g.n, c);
    Vec gate, up, out;
    if (!g.gated) {
      out = activate(load(z + c * size_of(g.in), g.in, left), g.activation);
    } else {
      load_halves(g, z, c, gate, up);
      if (g.activation == Activation::kClampedSwiglu) {
        gate = min_of(limit, gate);
        out = mul(mul(add(clamp(up, limit), one), gate), sigmoid(mul(alpha, gate)));
      } else {
        out = mul(activate(gate, g.activation), up);
      }
    }
    store(h + c * size_of(g.out), out, g.out, left);
  }
}

static void glu_grad(const Glu& g, const char* grad, const char* z, char* dz) {
  const Vec one = broadcast(1.f), limit = broadcast(g.limit), alpha = broadcast(g.alpha);
  for (int64_t c = 0; c < g.n; c += Vec::kLanes) {
    const int left = left_of(g.n, c);
    const Vec dh = load(grad + c * size_of(g.out), g.out, left);
    if (!g.gated) {
      const Vec x = load(z + c * size_of(g.in), g.in, left);
      store(dz + c * size_of(g.in), mul(dh, activation_slope(x, g.activation)), g.in, left);
      continue;
    }
    Vec gate, up, d_gate, d_up;
    load_halves(g, z, c, gate, up);
    if (g.activation == Activation::kClampedSwiglu) {
      const Vec x = min_of(limit, gate), s = sigmoid(mul(alpha, x));
      const Vec slope = mul(s, fma(mul(alpha, x), sub(one, s), one));
      d_gate = where_at_most(gate, limit, mul(mul(dh, add(clamp(up, limit), one)), slope));
      d_up = where_at_most(up, limit, mul(dh, mul(x, s)));
      d_up = where_at_most(sub(zero(), limit), up, d_up);
    } else {
      d_gate = mul(mul(dh, up), activation_slope(gate, g.activation));
      d_up = mul(dh, activate(gate, g.activation));
    }
    store_halves(g, dz, c, d_gate, d_up);
  }
}
