// The activation between the two GEMMs of an expert, gated or not, and its gradient. Included by
// kernels.inc.h.

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
