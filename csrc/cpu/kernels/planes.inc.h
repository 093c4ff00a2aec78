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

// kLanes pixels that lie side by side in each plane, to rows or from them, by squares of registers.
template <bool kGather, class T>
FORCE_INLINE void copy_square(const PlaneRows& p, int64_t i, char* planes, char* rows) {
  constexpr int64_t kLanes = Vec::kLanes;
  for (int64_t c = 0; c + kLanes <= p.channels; c += kLanes) {
    char* plane = planes + p.at[i] + c * p.channel_bytes;
    char* row = rows + i * p.row_bytes + c * int64_t(sizeof(T));
    Vec m[kLanes];
    UNROLL for (int64_t k = 0; k < kLanes; ++k) {
      m[k] = load_bits<T>(kGather ? plane + k * p.channel_bytes : row + k * p.row_bytes);
    }
    transpose(m);
    UNROLL for (int64_t k = 0; k < kLanes; ++k) {
      store_bits<T>(kGather ? row + k * p.row_bytes : plane + k * p.channel_bytes, m[k]);
    }
  }
}

// Channels [begin, p.channels) of row i.
template <bool kGather, class T>
FORCE_INLINE void copy_pixel(const PlaneRows& p, int64_t i, int64_t begin, char* planes, char* rows) {
  char* plane = planes + p.at[i] + begin * p.channel_bytes;
  T* row = (T*)(rows + i * p.row_bytes) + begin;
  if (begin == 0 && p.channels == kPlaneChannels) {
    UNROLL for (int64_t c = 0; c < kPlaneChannels; ++c) {
      T* element = (T*)(plane + c * p.channel_bytes);
      kGather ? row[c] = *element : * element = row[c];
    }
    return;
  }
  for (int64_t c = 0; c < p.channels - begin; ++c) {
    T* element = (T*)(plane + c * p.channel_bytes);
    kGather ? row[c] = *element : * element = row[c];
  }
}

template <bool kGather, class T>
static void copy_planes_of(const PlaneRows& all, char* planes, char* rows) {
  constexpr int64_t kLanes = Vec::kLanes;
  constexpr bool kSquares = sizeof(T) == 4 || (sizeof(T) == 2 && kLanes > 4);
  for (int64_t c = 0; c < all.channels; c += kPlaneChannels) {
    PlaneRows p = all;
    p.channels = all.channels - c < kPlaneChannels ? all.channels - c : kPlaneChannels;
    char* plane = planes + c * p.channel_bytes;
    char* row = rows + c * int64_t(sizeof(T));
    for (int64_t i = 0; i < p.rows;) {
      if constexpr (kSquares) {
        const bool side_by_side = p.ascends && i + kLanes <= p.rows &&
                                  p.at[i + kLanes - 1] - p.at[i] == (kLanes - 1) * int64_t(sizeof(T));
        if (side_by_side) {
          copy_square<kGather, T>(p, i, plane, row);
          const int64_t done = p.channels / kLanes * kLanes;
          if (done < p.channels) {
            for (int64_t k = 0; k < kLanes; ++k) copy_pixel<kGather, T>(p, i + k, done, plane, row);
          }
          i += kLanes;
          continue;
        }
      }
      copy_pixel<kGather, T>(p, i++, 0, plane, row);
    }
  }
}

struct Element16 {
  uint64_t low, high;
};

template <bool kGather>
static void copy_planes(const PlaneRows& p, char* planes, char* rows) {
  switch (p.size) {
    case 1:
      return copy_planes_of<kGather, uint8_t>(p, planes, rows);
    case 2:
      return copy_planes_of<kGather, uint16_t>(p, planes, rows);
    case 4:
      return copy_planes_of<kGather, uint32_t>(p, planes, rows);
    case 8:
      return copy_planes_of<kGather, uint64_t>(p, planes, rows);
    default:
      return copy_planes_of<kGather, Element16>(p, planes, rows);
  }
}

static void gather_planes(const PlaneRows& p, const char* planes, char* rows) {
  copy_planes<true>(p, const_cast<char*>(planes), rows);
}

static void scatter_planes(const PlaneRows& p, const char* rows, char* planes) {
  copy_planes<false>(p, planes, const_cast<char*>(rows));
}

// ------------------------------------------------------------------------- convolution of a line

// Products summed before they join the total: the rounding of a long sum grows with what it has summed.
constexpr int32_t kPlaneTaps = 128;

template <int kOuts, int kVectors>
static void plane_vectors(const PlaneLine& l, int32_t first, const int64_t* at, int vectors, int n) {
  Vec total[kOuts][kVectors];
  UNROLL for (int o = 0; o < kOuts; ++o) { UNROLL for (int v = 0; v < kVectors; ++v) total[o][v] = zero(); }
  const float* weight = l.weight + int64_t(first) * l.taps;
  int64_t x[kVectors];  // those past the last repeat it, which computes it again
  UNROLL for (int v = 0; v < kVectors; ++v) x[v] = at[v < vectors ? v : vectors - 1];
  for (int32_t begin = 0; begin < l.taps; begin += kPlaneTaps) {
    const int32_t end = l.taps - begin < kPlaneTaps ? l.taps : begin + kPlaneTaps;
    Vec sum[kOuts][kVectors];
    UNROLL for (int o = 0; o < kOuts; ++o) { UNROLL for (int v = 0; v < kVectors; ++v) sum[o][v] = zero(); }
    for (int32_t t = begin; t < end; ++t) {
      Vec in[kVectors];
      UNROLL for (int v = 0; v < kVectors; ++v) in[v] = load(l.in[t] + x[v]);
      UNROLL for (int o = 0; o < kOuts; ++o) {
        const Vec w = broadcast(weight[int64_t(o) * l.taps + t]);
        UNROLL for (int v = 0; v < kVectors; ++v) sum[o][v] = fma(in[v], w, sum[o][v]);
      }
    }
    UNROLL for (int o = 0; o < kOuts; ++o) {
      UNROLL for (int v = 0; v < kVectors; ++v) total[o][v] = add(total[o][v], sum[o][v]);
    }
  }
  const int64_t size = size_of(l.dtype);
  UNROLL for (int v = 0; v < kVectors; ++v) {
    const Vec keep = load(l.keep + x[v]), half = broadcast(0.5f);
    UNROLL for (int o = 0; o < kOuts; ++o) {
      const int64_t place = int64_t(first + o) * l.plane_bytes + x[v] * size;
      const Vec scale = broadcast(l.scale[first + o]), shift = broadcast(l.shift[first + o]);
      const Vec value = activate(fma(total[o][v], scale, shift), l.activation);
      Vec kept = where_less(zero(), keep, value);
      if (l.base) kept = add(kept, where_less(keep, half, load(l.base + place, l.dtype, n)));
      store(l.out + place, kept, l.dtype, n);
    }
  }
}

template <int kOuts, int kVectors>
static int32_t plane_outputs(const PlaneLine& l, int32_t first, const int64_t* live, int lives, int n) {
  for (; first + kOuts <= l.outputs; first += kOuts) {
    for (int i = 0; i < lives; i += kVectors) {
      plane_vectors<kOuts, kVectors>(l, first, live + i, lives - i < kVectors ? lives - i : kVectors, n);
    }
  }
  return first;
}

static void plane_line(const PlaneLine& l) {
  constexpr int64_t kLanes = Vec::kLanes;
  constexpr int kWide = kPanelVectors;  // 16 registers or 32
  constexpr int kGroup = 16;            // vectors whose inputs stay in the L1 cache for every output
  const int n = int(l.width < kLanes ? l.width : kLanes);
  const int64_t size = size_of(l.dtype), vectors = (l.width + kLanes - 1) / kLanes;
  for (int64_t first = 0; first < vectors; first += kGroup) {
    int64_t live[kGroup];
    int lives = 0;
    for (int64_t v = first; v < vectors && v < first + kGroup; ++v) {
      // the last vector is moved back on to the line; what it shares with the one before is the same
      const int64_t x = v * kLanes + kLanes <= l.width || l.width < kLanes ? v * kLanes : l.width - kLanes;
      bool any = false;
      for (int64_t i = 0; i < n; ++i) any |= l.keep[x + i] > 0;
      if (any) {
        live[lives++] = x;
        continue;
      }
      for (int32_t o = 0; o < l.outputs; ++o) {
        const int64_t place = int64_t(o) * l.plane_bytes + x * size;
        fill(l.out + place, l.base ? l.base + place : nullptr, n * size, false);
      }
    }
    if (!lives) continue;
    int32_t o = 0;
    if (l.outputs >= 8) o = plane_outputs<8, kWide>(l, o, live, lives, n);
    if (l.outputs - o >= 4) o = plane_outputs<4, 2 * kWide>(l, o, live, lives, n);
    if (l.outputs - o >= 2) o = plane_outputs<2, 2 * kWide>(l, o, live, lives, n);
    plane_outputs<1, 4>(l, o, live, lives, n);
  }
}
