// Dot products for selected outputs, and filters of single pixels. Included by kernels.inc.h.

// --------------------------------------------------------------------------------- output masks

constexpr int kDotRows = 8;  // 8 chains hide the FMA's latency: two of four cycles each a cycle

// Loads along the depth: floats, or pairs of bfloat16 where there is an instruction for them.
template <Dtype kType>
struct DepthVector {
  static constexpr int kElement = size_of(kType);
  static constexpr int kLanes = Vec::kLanes, kBytes = kLanes * kElement;
  Vec v;
  FORCE_INLINE DepthVector whole(const char* p) { return {load_as<kType>(p)}; }
  FORCE_INLINE DepthVector tail(const char* p, int n) { return {load(p, kType, n)}; }
  FORCE_INLINE Vec multiply(DepthVector a, DepthVector b, Vec sum) { return fma(a.v, b.v, sum); }
};

#if defined(DYNOPS_ISA_BF16)
template <>
struct DepthVector<Dtype::kBFloat16> {
  static constexpr int kElement = 2, kLanes = 32, kBytes = 64;
  __m512i v;
  FORCE_INLINE DepthVector whole(const char* p) { return {_mm512_loadu_si512(p)}; }
  FORCE_INLINE DepthVector tail(const char* p, int n) {
    return {_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p)};
  }
  FORCE_INLINE Vec multiply(DepthVector a, DepthVector b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};
#endif

#if defined(DYNOPS_ISA_AVX512)
// The sums of two vectors' lanes, side by side: half as many vectors after each step.
FORCE_INLINE __m512 folded(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
FORCE_INLINE __m512 folded_pairs(__m512 a, __m512 b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
FORCE_INLINE void lane_sums(const Vec (&a)[kDotRows], float* sums) {
  const __m512 low = folded_pairs(folded(a[0].v, a[1].v), folded(a[2].v, a[3].v));
  const __m512 high = folded_pairs(folded(a[4].v, a[5].v), folded(a[6].v, a[7].v));
  const __m512 four =  // lanes of 128 bits: low, low, high, high
      _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  const __m256 even = _mm512_castps512_ps256(_mm512_shuffle_f32x4(four, four, 0x08));
  const __m256 odd = _mm512_castps512_ps256(_mm512_shuffle_f32x4(four, four, 0x0d));
  _mm256_storeu_ps(sums, _mm256_add_ps(even, odd));
}
#else
FORCE_INLINE void lane_sums(const Vec (&a)[kDotRows], float* sums) {
  for (int i = 0; i < kDotRows; ++i) {
    float lanes[Vec::kLanes];
    store(lanes, a[i]);
    float sum = 0;
    for (int l = 0; l < Vec::kLanes; ++l) sum += lanes[l];
    sums[i] = sum;
  }
}
#endif

// MR rows at once share the loads of the weights, with kChains sums each to hide the latency.
template <Dtype kType, int MR, int kChains>
static __attribute__((noinline)) void dots_tile(const Dots& d, const char* const* rows, float* sums) {
  using Depth = DepthVector<kType>;
  const char* x[MR];
  UNROLL for (int i = 0; i < MR; ++i) x[i] = rows[i];
  Vec acc[MR][kChains];
  UNROLL for (int i = 0; i < MR; ++i) { UNROLL for (int u = 0; u < kChains; ++u) acc[i][u] = zero(); }
  KeptSums<MR, kChains> kept;
  constexpr int kRound = kChains * Depth::kLanes, kPart = kSumLength / 2 * kRound;
  int length = 0;  // of the longest of these sums
  const char* weight = d.weight;
  for (int s = 0; s < d.segments; ++s) {
    int64_t at = d.segment[s];
    for (int begin = 0; begin < d.depth; begin += kPart) {
      const int depth = d.depth - begin < kPart ? d.depth - begin : kPart;
      const int more = depth / kRound + (depth % kRound + Depth::kLanes - 1) / Depth::kLanes;
      if (length + more > kSumLength) {
        kept.take(acc);
        length = 0;
      }
      length += more;
      int k = 0;
      for (; k + kRound <= depth; k += kRound) {
#if defined(__x86_64__)
        asm("" : "+r"(at));  // else GCC steps MR pointers instead of one offset, and spills them at each tap
#endif
        UNROLL for (int u = 0; u < kChains; ++u) {
          const Depth w = Depth::whole(weight + u * Depth::kBytes);
          UNROLL for (int i = 0; i < MR; ++i) {
            acc[i][u] = Depth::multiply(Depth::whole(x[i] + at + u * Depth::kBytes), w, acc[i][u]);
          }
        }
        at += kChains * Depth::kBytes, weight += kChains * Depth::kBytes;
      }
      for (; k < depth; k += Depth::kLanes) {
        const int n = depth - k < Depth::kLanes ? depth - k : Depth::kLanes;
        const Depth w = Depth::tail(weight, n);
        UNROLL for (int i = 0; i < MR; ++i) acc[i][0] =
            Depth::multiply(Depth::tail(x[i] + at, n), w, acc[i][0]);
        at += n * Depth::kElement, weight += n * Depth::kElement;
      }
    }
  }
  if (!kept.empty) kept.add_to(acc);
  Vec total[kDotRows];
  UNROLL for (int i = 0; i < kDotRows; ++i) {
    total[i] = i < MR ? acc[i < MR ? i : 0][0] : zero();
    UNROLL for (int u = 1; u < kChains; ++u) if (i < MR) total[i] = add(total[i], acc[i < MR ? i : 0][u]);
  }
  lane_sums(total, sums);
}

template <Dtype kType>
static void dots_typed(const Dots& d) {
  using Tile = void (*)(const Dots&, const char* const*, float*);
  constexpr int kWide = kPanelVectors;  // two chains of 7 or 8 rows need more than 16 registers
  static constexpr Tile tile[kDotRows] = {
      dots_tile<kType, 1, 4>, dots_tile<kType, 2, 4>, dots_tile<kType, 3, 2>,     dots_tile<kType, 4, 2>,
      dots_tile<kType, 5, 2>, dots_tile<kType, 6, 2>, dots_tile<kType, 7, kWide>, dots_tile<kType, 8, kWide>};
  const int tiles = (d.rows + kDotRows - 1) / kDotRows;
  for (int i = 0, row = 0; i < tiles; ++i) {  // of nearly equal height
    const int height = d.rows / tiles + (i < d.rows % tiles);
    tile[height - 1](d, d.x + row, d.sums + row);  // the next tile overwrites what is past this one's height
    row += height;
  }
}

static void dots(const Dots& d) {
  with_float_type(d.dtype, [&](auto type) { dots_typed<type.value>(d); });
}

// --------------------------------------------------------------------------------- local filters

// NV vectors of each of kGroups groups: as many sums as hide the latency, a filter's value for NV of them.
// `n`: of the last channels of a group, less than a vector.
template <Dtype kType, int kGroups, int NV>
FORCE_INLINE void local_columns(const LocalFilter& f, int64_t group, int64_t channel, int n = Vec::kLanes) {
  constexpr int64_t kElement = size_of(kType), kVector = Vec::kLanes * kElement;
  const int64_t byte = channel * kElement, group_bytes = f.group * kElement;
  Vec acc[kGroups][NV];
  UNROLL for (int g = 0; g < kGroups; ++g) { UNROLL for (int v = 0; v < NV; ++v) acc[g][v] = zero(); }
  for (int j = 0; j < f.pairs; ++j) {
    const char* in = f.in + f.in_at[j] + byte;
    const float* filter = f.filter + f.filter_at[j] + group * f.filter_step;
    UNROLL for (int g = 0; g < kGroups; ++g) {
      const Vec k = broadcast(filter[g * f.filter_step]);
      UNROLL for (int v = 0; v < NV; ++v) {
        acc[g][v] = fma(k, load(in + g * group_bytes + v * kVector, kType, n), acc[g][v]);
      }
    }
  }
  UNROLL for (int g = 0; g < kGroups; ++g) {
    UNROLL for (int v = 0; v < NV; ++v)
        store(f.out + byte + g * group_bytes + v * kVector, acc[g][v], kType, n);
  }
}

// Channels of several groups.
template <Dtype kType>
static void local_wide(const LocalFilter& f) {
  const int64_t channels = f.groups * f.group;
  for (int64_t c = 0; c < channels; c += Vec::kLanes) {
    const int n = left_of(channels, c);
    const int64_t byte = c * size_of(kType);
    Vec acc = zero();
    for (int j = 0; j < f.pairs; ++j) {
      const Vec k = load_floats(f.wide + j * channels + c, n);
      acc = fma(k, load(f.in + f.in_at[j] + byte, kType, n), acc);
    }
    store(f.out + byte, acc, kType, n);
  }
}

template <Dtype kType>
static void local_filter_typed(const LocalFilter& f) {
  constexpr int kLanes = Vec::kLanes;
  if (f.wide) return local_wide<kType>(f);
  int64_t group = 0;
  for (; f.group == kLanes && group + 4 <= f.groups; group += 4) {
    local_columns<kType, 4, 1>(f, group, group * f.group);
  }
  for (; f.group == 2 * kLanes && group + 4 <= f.groups; group += 4) {
    local_columns<kType, 4, 2>(f, group, group * f.group);
  }
  for (; group < f.groups; ++group) {
    const int64_t end = (group + 1) * f.group;
    int64_t c = group * f.group;
    for (; c + 8 * kLanes <= end; c += 8 * kLanes) local_columns<kType, 1, 8>(f, group, c);
    for (; c + 4 * kLanes <= end; c += 4 * kLanes) local_columns<kType, 1, 4>(f, group, c);
    for (; c + kLanes <= end; c += kLanes) local_columns<kType, 1, 1>(f, group, c);
    if (c < end) local_columns<kType, 1, 1>(f, group, c, left_of(end, c));
  }
}

static void local_filter(const LocalFilter& f) {
  with_float_type(f.dtype, [&](auto type) { local_filter_typed<type.value>(f); });
}
