// Maps that lie channel by channel, [N, C, H, W]: pixels to rows and back, and thin convolutions line by
// line. Included by kernels.inc.h.

// ------------------------------------------------------------------------------- rows and planes

// Elements of 4 or 2 bytes as they are, each in a lane: no rounding, and a NaN keeps its bits.
template <class T>
FORCE_INLINE Vec load_bits(const char* p) {
  if constexpr (sizeof(T) == 4) return load((const float*)p);
#if defined(DYNOPS_ISA_AVX512)
  return {_mm512_castsi512_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)))};
#elif defined(DYNOPS_ISA_AVX2)
  return {_mm256_castsi256_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)))};
#else
  return zero();
#endif
}

template <class T>
FORCE_INLINE void store_bits(char* p, Vec a) {
  if constexpr (sizeof(T) == 4) return store((float*)p, a);
#if defined(DYNOPS_ISA_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_castps_si512(a.v)));
#elif defined(DYNOPS_ISA_AVX2)
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#endif
}

// Channels copied in one pass over the rows: a cache line of a float32 row.
constexpr int64_t kPlaneChannels = 16;

// Elements that the squares of registers below copy; others go one by one.
template <class T>
constexpr bool kSquares = sizeof(T) == 4 || (sizeof(T) == 2 && Vec::kLanes > 4);

struct Element16 {
  uint64_t low, high;
};

// f(an element of the size)
template <class F>
FORCE_INLINE void visit_size(int64_t size, const F& f) {
  switch (size) {
    case 1:
      return f(uint8_t());
    case 2:
      return f(uint16_t());
    case 4:
      return f(uint32_t());
    case 8:
      return f(uint64_t());
    default:
      return f(Element16());
  }
}

// Channels [begin, channels) of one pixel to a row.
template <class T>
FORCE_INLINE void gather_pixel(const char* plane, int64_t channel_bytes, int64_t begin, int64_t channels,
                               T* row) {
  if (begin == 0 && channels == kPlaneChannels) {
    UNROLL for (int64_t c = 0; c < kPlaneChannels; ++c) row[c] = *(const T*)(plane + c * channel_bytes);
    return;
  }
  for (int64_t c = begin; c < channels; ++c) row[c] = *(const T*)(plane + c * channel_bytes);
}

template <class T>
static void gather_planes_of(const PlaneRows& p, int64_t channels, bool more, const char* planes,
                             char* rows) {
  constexpr int64_t kLanes = Vec::kLanes, kSize = sizeof(T);
  for (int64_t i = 0; i < p.rows;) {
    const char* plane = planes + p.at[i];
    char* row = rows + i * p.row_bytes;
    int64_t done = 0, count = 1;
    if constexpr (kSquares<T>) {
      if (p.ascends && i + kLanes <= p.rows && p.at[i + kLanes - 1] - p.at[i] == (kLanes - 1) * kSize) {
        count = kLanes;
        for (; done + kLanes <= channels; done += kLanes) {
          Vec m[kLanes];
          UNROLL for (int64_t k = 0; k < kLanes; ++k) {
            const char* from = plane + (done + k) * p.channel_bytes;
            if (more) __builtin_prefetch(from + kPlaneChannels * p.channel_bytes);
            m[k] = load_bits<T>(from);
          }
          transpose(m);
          UNROLL for (int64_t k = 0; k < kLanes; ++k) {
            char* to = row + k * p.row_bytes + done * kSize;
            if (more) __builtin_prefetch(to + kPlaneChannels * kSize, 1);
            store_bits<T>(to, m[k]);
          }
        }
      }
    }
    for (int64_t k = 0; k < count && done < channels; ++k) {
      gather_pixel<T>(planes + p.at[i + k], p.channel_bytes, done, channels, (T*)(row + k * p.row_bytes));
    }
    i += count;
  }
}

static void gather_planes(const PlaneRows& p, const char* planes, char* rows) {
  for (int64_t c = 0; c < p.channels; c += kPlaneChannels) {
    const int64_t channels = p.channels - c < kPlaneChannels ? p.channels - c : kPlaneChannels;
    const bool more =
        c + 2 * kPlaneChannels <= p.channels;  // no stream follows so many planes: they are asked for
    visit_size(p.size, [&](auto element) {
      gather_planes_of<decltype(element)>(p, channels, more, planes + c * p.channel_bytes, rows + c * p.size);
    });
  }
}

// From this many active pixels on, a whole vector goes through a square of registers. That takes some 75
// cycles for 16 x 16 elements; an element on its own takes one.
constexpr int kSquarePixels = 4;

template <class T>
static void spread_planes_of(const PlaneSpread& p, int64_t channels, const char* rows, char* planes) {
  constexpr int64_t kLanes = Vec::kLanes, kSize = sizeof(T);
  for (int64_t i = 0; i < p.pixels; i += kLanes) {
    const int32_t* row = p.row + i;
    const int n = left_of(p.pixels, i);
    int active = 0;
    for (int k = 0; k < n; ++k) active += row[k] >= 0;
    char* plane = planes + i * kSize;
    int64_t done = 0;
    if constexpr (kSquares<T>) {
      if (n == kLanes && active >= kSquarePixels) {
        for (; done + kLanes <= channels; done += kLanes) {
          Vec m[kLanes];
          UNROLL for (int k = 0; k < kLanes; ++k) {
            if (row[k] < 0) {
              m[k] = zero();
              continue;
            }
            const char* from = rows + row[k] * p.row_bytes + done * kSize;
            __builtin_prefetch(from + 64);  // the next channels of this row
            m[k] = load_bits<T>(from);
          }
          transpose(m);
          UNROLL for (int64_t k = 0; k < kLanes; ++k) {
            store_bits<T>(plane + (done + k) * p.channel_bytes, m[k]);
          }
        }
      }
    }
    if (active < n) {
      for (int64_t c = done; c < channels; ++c) fill(plane + c * p.channel_bytes, nullptr, n * kSize, false);
    }
    for (int k = 0; k < n && done < channels; ++k) {
      if (row[k] < 0) continue;
      const T* from = (const T*)(rows + row[k] * p.row_bytes);
      for (int64_t c = done; c < channels; ++c) *(T*)(plane + c * p.channel_bytes + k * kSize) = from[c];
    }
  }
}

static void spread_planes(const PlaneSpread& p) {
  for (int64_t c = 0; c < p.channels; c += kPlaneChannels) {
    const int64_t channels = p.channels - c < kPlaneChannels ? p.channels - c : kPlaneChannels;
    visit_size(p.size, [&](auto element) {
      spread_planes_of<decltype(element)>(p, channels, p.rows + c * p.size, p.planes + c * p.channel_bytes);
    });
  }
}

static void split_pairs(const float* from, int64_t n, float* even, float* odd) {
  constexpr int64_t kLanes = Vec::kLanes;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    Vec low, high;
    deinterleave(load(from + i), load(from + i + kLanes), low, high);
    store(even + i / 2, low);
    store(odd + i / 2, high);
  }
  for (; i < n; ++i) (i % 2 ? odd : even)[i / 2] = from[i];
}

// ------------------------------------------------------------------------- convolution of planes

// Products summed before they join the total: the rounding of a long sum grows with what it has summed. Where
// the total has registers beside the sums, parts are short.
template <int kSums>
constexpr int32_t kPlaneTaps = kSums <= 8 ? 32 : 64;

// sum[o][v] += the products of taps [begin, end)
template <int kOuts, int kVectors>
FORCE_INLINE void plane_products(const PlaneStrip& s, const float* weight, const float* const (&in)[kVectors],
                                 int32_t begin, int32_t end, Vec (&sum)[kOuts][kVectors]) {
  for (int32_t t = begin; t < end; ++t) {
    const int64_t offset = s.offset[t];
    Vec x[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) x[v] = load(in[v] + offset);
    UNROLL for (int o = 0; o < kOuts; ++o) {
      const Vec w = broadcast(weight[int64_t(o) * s.taps + t]);
      UNROLL for (int v = 0; v < kVectors; ++v) sum[o][v] = fma(x[v], w, sum[o][v]);
    }
  }
}

template <int kOuts, int kVectors>
static void plane_vectors(const PlaneStrip& s, int32_t first, int32_t begin, int32_t count) {
  constexpr int32_t kPart = kPlaneTaps<kOuts * kVectors>;
  Vec total[kOuts][kVectors];
  UNROLL for (int o = 0; o < kOuts; ++o) { UNROLL for (int v = 0; v < kVectors; ++v) total[o][v] = zero(); }
  const float* weight = s.weight + int64_t(first) * s.taps;
  const float* in[kVectors];  // those past the last repeat it, which computes it again
  UNROLL for (int v = 0; v < kVectors; ++v) in[v] = s.in + s.in_at[begin + (v < count ? v : count - 1)];
  plane_products<kOuts, kVectors>(s, weight, in, 0, s.taps < kPart ? s.taps : kPart, total);
  for (int32_t from = kPart; from < s.taps; from += kPart) {
    Vec sum[kOuts][kVectors];
    UNROLL for (int o = 0; o < kOuts; ++o) { UNROLL for (int v = 0; v < kVectors; ++v) sum[o][v] = zero(); }
    const int32_t end = s.taps - from < kPart ? s.taps : from + kPart;
    plane_products<kOuts, kVectors>(s, weight, in, from, end, sum);
    UNROLL for (int o = 0; o < kOuts; ++o) {
      UNROLL for (int v = 0; v < kVectors; ++v) total[o][v] = add(total[o][v], sum[o][v]);
    }
  }
  UNROLL for (int o = 0; o < kOuts; ++o) {
    const Vec scale = broadcast(s.scale[first + o]), shift = broadcast(s.shift[first + o]);
    UNROLL for (int v = 0; v < kVectors; ++v) total[o][v] = fma(total[o][v], scale, shift);
  }
  const int64_t size = size_of(s.dtype);
  const bool plain =
      s.activation == Activation::kNone && s.dtype == Dtype::kFloat32 && !s.base && s.width == Vec::kLanes;
  UNROLL for (int v = 0; v < kVectors; ++v) {
    if (v >= count) break;
    const Vec keep = load(s.keep + int64_t(begin + v) * Vec::kLanes), half = broadcast(0.5f);
    const int64_t place = int64_t(first) * s.plane_bytes + s.out_at[begin + v] * size;
    if (plain) {  // 64 outputs of 9 taps: 24 instructions a vector with what follows, 4 without
      UNROLL for (int o = 0; o < kOuts; ++o) {
        store((float*)(s.out + place + o * s.plane_bytes), where_less(zero(), keep, total[o][v]));
      }
      continue;
    }
    UNROLL for (int o = 0; o < kOuts; ++o) {
      const int64_t at = place + o * s.plane_bytes;
      Vec kept = where_less(zero(), keep, activate(total[o][v], s.activation));
      if (s.base) kept = add(kept, where_less(keep, half, load(s.base + at, s.dtype, s.width)));
      store(s.out + at, kept, s.dtype, s.width);
    }
  }
}

template <int kOuts, int kVectors>
static int32_t plane_outputs(const PlaneStrip& s, int32_t first, int32_t begin, int32_t end) {
  for (; first + kOuts <= s.outputs; first += kOuts) {
    for (int32_t i = begin; i < end; i += kVectors) {
      plane_vectors<kOuts, kVectors>(s, first, i, end - i < kVectors ? end - i : kVectors);
    }
  }
  return first;
}

static void plane_strip(const PlaneStrip& s) {
  constexpr int kWide = kPanelVectors;  // 16 registers or 32
  constexpr int32_t kGroup = 16;        // vectors whose inputs stay in the L1 cache for every output
  for (int32_t begin = 0; begin < s.live; begin += kGroup) {
    const int32_t end = s.live - begin < kGroup ? s.live : begin + kGroup;
    int32_t o = 0;
    if (s.outputs >= 8) o = plane_outputs<8, kWide>(s, o, begin, end);
    if (s.outputs - o >= 4) o = plane_outputs<4, 2 * kWide>(s, o, begin, end);
    if (s.outputs - o >= 2) o = plane_outputs<2, 4 * kWide>(s, o, begin, end);
    plane_outputs<1, 4 * kWide>(s, o, begin, end);
  }
}
