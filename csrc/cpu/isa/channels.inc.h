// Live channels: rows compacted and spread, panels of a packed weight picked. Included by kernels.inc.h.

#if defined(DYNOPS_ISA_AVX512)

// Sixteen live channels and the vectors of sixteen channels that hold them: two or three where half are live.
// Each lane takes one channel of one vector, by a permutation: vpcompressd into unaligned, overlapping stores
// would write twice as often.
struct LiveVector {
  __m512i lane;  // vpermd reads the low four bits: the channel's place in its vector
  int count, vectors;
  int32_t vector[16];
  __mmask16 takes[16], reads[16];  // reads: not past the row's end

  LiveVector(const ChannelList& list, int32_t first) {
    count = list.count - first < 16 ? list.count - first : 16;
    const __mmask16 valid = lanes_mask(count);
    lane = _mm512_maskz_loadu_epi32(valid, list.index + first);
    const __m512i home = _mm512_srli_epi32(lane, 4);
    vectors = 0;
    for (int32_t v = list.index[first] / 16, last = list.index[first + count - 1] / 16; v <= last; ++v) {
      const __mmask16 takes_v = _mm512_mask_cmpeq_epi32_mask(valid, home, _mm512_set1_epi32(v));
      if (!takes_v) continue;
      vector[vectors] = v;
      takes[vectors] = takes_v;
      reads[vectors++] = lanes_mask(list.channels - v * 16);
    }
  }
};

template <bool kWide>
FORCE_INLINE __m512i load_lanes(const char* p, __mmask16 reads) {
  if constexpr (kWide) return _mm512_maskz_loadu_epi32(reads, p);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(reads, p));
}

template <bool kWide>
FORCE_INLINE void store_lanes(char* p, __m512i v, __mmask16 writes) {
  if constexpr (kWide) return _mm512_mask_storeu_epi32(p, writes, v);
  _mm256_mask_storeu_epi16(p, writes, _mm512_cvtepi32_epi16(v));
}

FORCE_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
}

template <class T>
static void compress_of(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list,
                        char* to, int64_t to_stride) {
  constexpr bool kWide = sizeof(T) == 4;
  constexpr int64_t kElement = sizeof(T), kRows = 32;  // 32 rows stay in the L1 cache
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t height = rows - first < kRows ? rows - first : kRows;
    for (int32_t j = 0; j < list.count; j += 16) {
      const LiveVector live(list, j);
      const __mmask16 writes = lanes_mask(live.count);
      for (int64_t i = first; i < first + height; ++i) {
        const char* row = from + i * from_stride;
        if (j == 0 && i + kRows < rows) prefetch_row(row + kRows * from_stride, list.channels * kElement);
        __m512i out = _mm512_setzero_si512();
        for (int s = 0; s < live.vectors; ++s) {
          const __m512i in = load_lanes<kWide>(row + live.vector[s] * (16 * kElement), live.reads[s]);
          out = _mm512_mask_permutexvar_epi32(out, live.takes[s], live.lane, in);
        }
        store_lanes<kWide>(to + i * to_stride + j * kElement, out, writes);
      }
    }
  }
}

// The live ones of sixteen channels, from `list.index[at]` on.
FORCE_INLINE __mmask16 live_mask(const ChannelList& list, int32_t at, int32_t channel) {
  const __mmask16 valid = lanes_mask(list.count - at);
  const __m512i place =
      _mm512_sub_epi32(_mm512_maskz_loadu_epi32(valid, list.index + at), _mm512_set1_epi32(channel));
  const __mmask16 inside = _mm512_mask_cmplt_epi32_mask(valid, place, _mm512_set1_epi32(16));
  return __mmask16(_mm512_mask_reduce_or_epi32(inside, _mm512_sllv_epi32(_mm512_set1_epi32(1), place)));
}

// Sixteen channels of one row: a live one is lane `place` of what lies at `from`.
template <bool kWide>
FORCE_INLINE __m512i expanded(const char* from, __mmask16 reads, __m512i place, __mmask16 live,
                              const char* base, __mmask16 writes) {
  const __m512i other = base ? load_lanes<kWide>(base, writes) : _mm512_setzero_si512();
  return _mm512_mask_permutexvar_epi32(other, live, place, load_lanes<kWide>(from, reads));
}

template <class T>
static void expand_of(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list,
                      const char* base, int64_t base_stride, char* to, int64_t to_stride, bool stream) {
  constexpr bool kWide = sizeof(T) == 4;
  constexpr int64_t kElement = sizeof(T), kRows = 32;
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const bool lines = kWide && stream && to_stride % 64 == 0 && (uintptr_t)to % 64 == 0;
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t end = rows - first < kRows ? rows : first + kRows;
    for (int32_t c = 0, at = 0; c < list.channels; c += 16) {
      const __mmask16 live = live_mask(list, at, c), writes = lanes_mask(list.channels - c);
      const int taken = __builtin_popcount(live);
      const __mmask16 reads = lanes_mask(taken);
      const __m512i place = _mm512_maskz_expand_epi32(live, iota);
      for (int64_t i = first; i < end; ++i) {
        const char* below = base ? base + i * base_stride + c * kElement : nullptr;
        const __m512i out =
            expanded<kWide>(from + i * from_stride + at * kElement, reads, place, live, below, writes);
        char* cell = to + i * to_stride + c * kElement;
        if (lines) {
          _mm512_stream_si512((__m512i*)cell, out);
        } else {
          store_lanes<kWide>(cell, out, writes);
        }
      }
      at += taken;
    }
  }
}

// The list may be a piece of one, say a panel of columns: only vectors with one of its channels are touched.
static void expand_add(const float* from, int64_t stride, int64_t rows, const ChannelList& list,
                       float* const* to) {
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int32_t at = 0; at < list.count;) {
    const int32_t c = list.index[at] / 16 * 16;
    const __mmask16 live = live_mask(list, at, c), reads = lanes_mask(__builtin_popcount(live));
    const bool whole = c + 16 <= list.channels;
    const __m512i place = _mm512_maskz_expand_epi32(live, iota);
    for (int64_t i = 0; i < rows; ++i) {
      const __m512 sums = _mm512_maskz_loadu_ps(reads, from + i * stride + at);
      const __m512 spread = _mm512_maskz_permutexvar_ps(live, place, sums);
      float* cell = to[i] + c;
      if (whole) {
        _mm512_storeu_ps(cell, _mm512_add_ps(spread, _mm512_loadu_ps(cell)));
      } else {
        _mm512_mask_storeu_ps(cell, live, _mm512_add_ps(spread, _mm512_maskz_loadu_ps(live, cell)));
      }
    }
    at += __builtin_popcount(live);
  }
}

// The live row j of a vector of columns (of pairs: j and j + 1, from the halves of one or two rows of pairs).
template <bool kDot>
FORCE_INLINE __m512i weight_lanes(const char* at, int shift, const ChannelList& rows, int32_t j) {
  const int64_t low = rows.index[j];
  if constexpr (!kDot) return _mm512_loadu_si512(at + (low << shift));
  const __m512i a = _mm512_loadu_si512(at + (low >> 1 << shift));
  const __m512i a_low = low & 1 ? _mm512_srli_epi32(a, 16) : _mm512_and_epi32(a, _mm512_set1_epi32(0xffff));
  if (j + 1 == rows.count) return a_low;
  const int64_t high = rows.index[j + 1];
  const __m512i b = _mm512_loadu_si512(at + (high >> 1 << shift));
  return _mm512_mask_blend_epi16(0xaaaaaaaau, a_low, high & 1 ? b : _mm512_slli_epi32(b, 16));
}

// The sources of sixteen live columns of a segment.
struct LiveColumns {
  LiveVector live;
  const char* from[16];
  int shift[16];     // a row of a panel is 2^shift bytes
  bool wide = true;  // all of full panels

  LiveColumns(const PanelPick& pick, int32_t first, int64_t first_row) : live(pick.columns, first) {
    for (int s = 0; s < live.vectors; ++s) {
      const int64_t column = int64_t(live.vector[s]) * 16, panel = column / kPanelWidth * kPanelWidth;
      const bool half = pick.layout.columns - panel <= kPanelWidth - 16;  // the last panel may be
      wide &= !half;
      shift[s] = half ? 6 : 7;
      from[s] = pick.from + panel * pick.layout.depth * (pick.dot ? 2 : 4) + (column - panel) * 4 +
                (first_row << shift[s]);
    }
  }
};

// The rows of a segment: 16 columns, or 32 (kTwo) whose sources, kA and kB vectors (0: any number), share
// lines of the weight.
template <int kA, int kB, bool kDot>
static void pick_rows(const ChannelList rows, const LiveColumns* columns, char* to, int64_t step) {
  constexpr int kNumber[2] = {kA, kB};
  const LiveColumns c[2] = {columns[0], columns[kB < 0 ? 0 : 1]};  // copies: stores of char could change them
  for (int32_t j = 0; j < rows.count; j += kDot ? 2 : 1, to += step) {
    UNROLL for (int half = 0; half < (kB < 0 ? 1 : 2); ++half) {
      const int vectors = kNumber[half] ? kNumber[half] : c[half].live.vectors;
      __m512i out = _mm512_setzero_si512();
      UNROLL for (int s = 0; s < vectors; ++s) {
        const int shift = kNumber[half] ? 7 : c[half].shift[s];
        const __m512i in = weight_lanes<kDot>(c[half].from[s], shift, rows, j);
        out = _mm512_mask_permutexvar_epi32(out, c[half].live.takes[s], c[half].live.lane, in);
      }
      _mm512_storeu_si512(to + half * 64, out);
    }
  }
}

template <bool kDot>
static void pick_columns(const PanelPick& pick, int32_t first, int64_t first_row, char* to) {
  const bool two = pick.columns.count - first > 16;
  const LiveColumns columns[2] = {{pick, first, first_row}, {pick, two ? first + 16 : first, first_row}};
  if (!two) return pick_rows<0, -1, kDot>(pick.rows, columns, to, 64);
  using Pick = decltype(&pick_rows<0, 0, kDot>);
  static constexpr Pick kPick[3][3] = {{pick_rows<2, 2, kDot>, pick_rows<2, 3, kDot>, pick_rows<2, 4, kDot>},
                                       {pick_rows<3, 2, kDot>, pick_rows<3, 3, kDot>, pick_rows<3, 4, kDot>},
                                       {pick_rows<4, 2, kDot>, pick_rows<4, 3, kDot>, pick_rows<4, 4, kDot>}};
  const int a = columns[0].live.vectors - 2, b = columns[1].live.vectors - 2;
  const bool usual = a >= 0 && a < 3 && b >= 0 && b < 3 && columns[0].wide && columns[1].wide;
  (usual ? kPick[a][b] : pick_rows<0, 0, kDot>)(pick.rows, columns, to, 128);
}

static void pick_panel(const PanelPick& pick, int64_t panel, int64_t segment, char* to) {
  const int64_t row = segment * (pick.layout.depth / pick.segments);
  const int32_t first = int32_t(panel) * kPanelWidth;
  pick.dot ? pick_columns<true>(pick, first, row / 2, to) : pick_columns<false>(pick, first, row, to);
}

#else  // without permutations by a variable: channel by channel

template <class T>
static void compress_of(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list,
                        char* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i, from += from_stride, to += to_stride) {
    for (int32_t j = 0; j < list.count; ++j) ((T*)to)[j] = ((const T*)from)[list.index[j]];
  }
}

template <class T>
static void expand_of(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list,
                      const char* base, int64_t base_stride, char* to, int64_t to_stride, bool) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = (const T*)(from + i * from_stride);
    T* out = (T*)(to + i * to_stride);
    fill((char*)out, base ? base + i * base_stride : nullptr, list.channels * int64_t(sizeof(T)), false);
    for (int32_t j = 0; j < list.count; ++j) out[list.index[j]] = row[j];
  }
}

static void expand_add(const float* from, int64_t stride, int64_t rows, const ChannelList& list,
                       float* const* to) {
  for (int64_t i = 0; i < rows; ++i, from += stride) {
    for (int32_t j = 0; j < list.count; ++j) to[i][list.index[j]] += from[j];
  }
}

// Columns that a panel has room for, `left` columns before the last one's end.
static int64_t stored_width(int64_t left) {
  return left > kPanelWidth - Vec::kLanes ? kPanelWidth
                                          : (left + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
}

static void pick_panel(const PanelPick& pick, int64_t panel, int64_t segment, char* to) {
  const int64_t first = panel * kPanelWidth, left = pick.columns.count - first, width = stored_width(left);
  const int64_t segment_row = segment * (pick.layout.depth / pick.segments);
  float* out = (float*)to;
  for (int64_t i = 0; i < width; ++i) {
    const int64_t column = i < left ? pick.columns.index[first + i] : 0,
                  home = column / kPanelWidth * kPanelWidth;
    const int64_t stored = stored_width(pick.layout.columns - home);
    const float* from =
        (const float*)pick.from + home * pick.layout.depth + segment_row * stored + column - home;
    for (int32_t j = 0; j < pick.rows.count; ++j)
      out[j * width + i] = i < left ? from[pick.rows.index[j] * stored] : 0.f;
  }
}

#endif

static void compress(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list,
                     Dtype dtype, char* to, int64_t to_stride) {
  const auto run = dtype == Dtype::kFloat32 ? compress_of<uint32_t> : compress_of<uint16_t>;
  run(from, from_stride, rows, list, to, to_stride);
}

static void expand(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list, Dtype dtype,
                   const char* base, int64_t base_stride, char* to, int64_t to_stride, bool stream) {
  const auto run = dtype == Dtype::kFloat32 ? expand_of<uint32_t> : expand_of<uint16_t>;
  run(from, from_stride, rows, list, base, base_stride, to, to_stride, stream);
}
