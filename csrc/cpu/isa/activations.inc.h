// Activations of vectors, and their slopes. Included by kernels.inc.h.

// e^x to about one unit in the last place: x = n ln2 + r, a polynomial of degree 6 in r (Cephes).
FORCE_INLINE Vec exponential(Vec x) {
  x = max_of(broadcast(-87.f), min_of(broadcast(88.f), x));
  const Vec n = round_to_integer(mul(x, broadcast(1.44269504088896341f)));
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  return mul(add(fma(mul(r, r), p, r), broadcast(1.f)), power_of_two(n));
}

FORCE_INLINE Vec sigmoid(Vec x) {
  return div(broadcast(1.f), add(broadcast(1.f), exponential(mul(x, broadcast(-1.f)))));
}

// erf(x): an odd rational function on [-4, 4] (as Eigen and XLA use), within 2e-7 of erf.
FORCE_INLINE Vec error_function(Vec x) {
  x = max_of(broadcast(-4.f), min_of(broadcast(4.f), x));
  const Vec s = mul(x, x);
  Vec p = broadcast(-2.72614225801306e-10f);
  p = fma(p, s, broadcast(2.77068142495902e-08f));
  p = fma(p, s, broadcast(-2.10102402082508e-06f));
  p = fma(p, s, broadcast(-5.69250639462346e-05f));
  p = fma(p, s, broadcast(-7.34990630326855e-04f));
  p = fma(p, s, broadcast(-2.95459980854025e-03f));
  p = fma(p, s, broadcast(-1.60960333262415e-02f));
  Vec q = broadcast(-1.45660718464996e-05f);
  q = fma(q, s, broadcast(-2.13374055278905e-04f));
  q = fma(q, s, broadcast(-1.68282697438203e-03f));
  q = fma(q, s, broadcast(-7.37332916720468e-03f));
  q = fma(q, s, broadcast(-1.42647390514189e-02f));
  return div(mul(x, p), q);
}

FORCE_INLINE Vec activate(Vec x, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return max_of(zero(), x);
    case Activation::kRelu6:
      return min_of(broadcast(6.f), max_of(zero(), x));
    case Activation::kSilu:
      return mul(x, sigmoid(x));
    case Activation::kGelu: {
      const Vec half = mul(x, broadcast(0.5f));
      return fma(half, error_function(mul(x, broadcast(0.70710678118654752f))), half);
    }
    case Activation::kGeluTanh: {  // 0.5 x (1 + tanh u) = x sigmoid(2 u)
      const Vec u = mul(x, fma(mul(x, x), broadcast(0.0356774081363f), broadcast(0.7978845608028654f)));
      return mul(x, sigmoid(add(u, u)));
    }
    case Activation::kHardswish: {
      const Vec inner = min_of(broadcast(6.f), max_of(zero(), add(x, broadcast(3.f))));
      return mul(mul(x, inner), broadcast(1.f / 6.f));
    }
    case Activation::kRelu2: {
      const Vec positive = max_of(zero(), x);
      return mul(positive, positive);
    }
    default:
      return x;
  }
}

// activate's derivative at x; at a kink that of torch.
FORCE_INLINE Vec activation_slope(Vec x, Activation activation) {
  const Vec one = broadcast(1.f);
  switch (activation) {
    case Activation::kRelu:
      return where_less(zero(), x, one);
    case Activation::kRelu6:
      return where_less(zero(), x, where_less(x, broadcast(6.f), one));
    case Activation::kSilu: {
      const Vec s = sigmoid(x);
      return mul(s, fma(x, sub(one, s), one));
    }
    case Activation::kGelu: {  // the normal distribution, and x times its density
      const Vec half = broadcast(0.5f), density = exponential(mul(mul(x, x), broadcast(-0.5f)));
      const Vec below = fma(half, error_function(mul(x, broadcast(0.70710678118654752f))), half);
      return fma(mul(x, broadcast(0.3989422804014327f)), density, below);
    }
    case Activation::kGeluTanh: {
      const Vec square = mul(x, x);
      const Vec u = mul(x, fma(square, broadcast(0.0356774081363f), broadcast(0.7978845608028654f)));
      const Vec du = fma(square, broadcast(0.1070322244089f), broadcast(0.7978845608028654f));
      // 1 - s as e s: where s is near 1 the difference would have lost its digits, which 2 x du then shows
      const Vec e = exponential(mul(u, broadcast(-2.f))), s = div(one, add(one, e));
      return fma(mul(add(x, x), du), mul(mul(e, s), s), s);
    }
    case Activation::kHardswish: {
      const Vec three = broadcast(3.f), inner = fma(x, broadcast(1.f / 3.f), broadcast(0.5f));
      const Vec middle = where_less(broadcast(-3.f), x, where_less(x, three, inner));
      return add(middle, where_at_most(three, x, one));
    }
    case Activation::kRelu2: {
      const Vec positive = max_of(zero(), x);
      return add(positive, positive);
    }
    default:
      return one;
  }
}
