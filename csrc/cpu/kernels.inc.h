// The kernels of one instruction set: included by isa_<name>.cpp, inside its namespace and after its
// target pragma, with DYNOPS_ISA_* defined. Everything here is compiled once for each.

#define FORCE_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#include "vec.h"

// Vectors in a full panel: two where there are 32 registers, one where there are 16.
#if defined(DYNOPS_ISA_AVX512)
constexpr int kPanelVectors = 2;
#else
constexpr int kPanelVectors = 1;
#endif
constexpr int kPanelWidth = kPanelVectors * Vec::kLanes;

// ---------------------------------------------------------------------------------------- filling

// Plain vector stores: libc's memset turns to `rep stosb` at 2 KB, and then runs at 30 GB/s, not 160. The
// last vector may lie over the one before it.
static void fill(char* to, const char* from, int64_t bytes, bool stream) {
  constexpr int64_t kVector = Vec::kLanes * 4;
  const int64_t last = bytes - kVector;
  if (last < 0) {
    from ? __builtin_memcpy(to, from, size_t(bytes)) : __builtin_memset(to, 0, size_t(bytes));
    return;
  }
  int64_t i = 0;
  if (from) {
    for (; i < last; i += kVector) store((float*)(to + i), load((const float*)(from + i)));
    store((float*)(to + last), load((const float*)(from + last)));
    return;
  }
#if defined(DYNOPS_ISA_AVX512)
  if (stream && (uintptr_t)to % kVector == 0) {
    for (; i <= last; i += kVector) _mm512_stream_ps((float*)(to + i), zero().v);
    if (i == bytes) return;
  }
#endif
  (void)stream;
  for (; i < last; i += kVector) store((float*)(to + i), zero());
  store((float*)(to + last), zero());
}

// -------------------------------------------------------------------------------------- channels

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

template <bool kWide>
static void compress_of(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list,
                        char* to, int64_t to_stride) {
  constexpr int64_t kElement = kWide ? 4 : 2, kRows = 32;  // 32 rows stay in the L1 cache
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

template <bool kWide>
static void expand_of(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list,
                      const char* base, int64_t base_stride, char* to, int64_t to_stride, bool stream) {
  constexpr int64_t kElement = kWide ? 4 : 2, kRows = 32;
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

// Of a part of a list, say a panel of columns: only vectors that hold one of its channels are touched.
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

static void compress(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list,
                     Dtype dtype, char* to, int64_t to_stride) {
  const auto run = dtype == Dtype::kFloat32 ? compress_of<true> : compress_of<false>;
  run(from, from_stride, rows, list, to, to_stride);
}

static void expand(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list, Dtype dtype,
                   const char* base, int64_t base_stride, char* to, int64_t to_stride, bool stream) {
  const auto run = dtype == Dtype::kFloat32 ? expand_of<true> : expand_of<false>;
  run(from, from_stride, rows, list, base, base_stride, to, to_stride, stream);
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

// Where sixteen live columns of a segment come from.
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
                      const char* base, int64_t base_stride, char* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = (const T*)(from + i * from_stride);
    T* out = (T*)(to + i * to_stride);
    fill((char*)out, base ? base + i * base_stride : nullptr, list.channels * int64_t(sizeof(T)), false);
    for (int32_t j = 0; j < list.count; ++j) out[list.index[j]] = row[j];
  }
}

static void compress(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list,
                     Dtype dtype, char* to, int64_t to_stride) {
  const auto run = dtype == Dtype::kFloat32 ? compress_of<uint32_t> : compress_of<uint16_t>;
  run(from, from_stride, rows, list, to, to_stride);
}

static void expand(const char* from, int64_t from_stride, int64_t rows, const ChannelList& list, Dtype dtype,
                   const char* base, int64_t base_stride, char* to, int64_t to_stride, bool) {
  const auto run = dtype == Dtype::kFloat32 ? expand_of<uint32_t> : expand_of<uint16_t>;
  run(from, from_stride, rows, list, base, base_stride, to, to_stride);
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

// ------------------------------------------------------------------------------------- the GEMM

template <int MR, int NV>
FORCE_INLINE void multiply_one(Vec (&acc)[MR][NV], const float* const (&a)[MR], int64_t k,
                               const float* weight) {
  Vec b[NV];
  UNROLL for (int v = 0; v < NV; ++v) b[v] = load(weight + v * Vec::kLanes);
  UNROLL for (int i = 0; i < MR; ++i) {
    const Vec x = broadcast(a[i][k]);
    UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = fma(x, b[v], acc[i][v]);
  }
}

// acc += the outer products of MR broadcast inputs and NV vectors of weights, over one segment.
template <int MR, int NV>
FORCE_INLINE void multiply_segment(Vec (&acc)[MR][NV], const char* const* in, int64_t in_offset, int depth,
                                   const float* weight) {
  const float* a[MR];
  UNROLL for (int i = 0; i < MR; ++i) a[i] = (const float*)(in[i] + in_offset);
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4, weight += 4 * NV * Vec::kLanes) {
    UNROLL for (int u = 0; u < 4; ++u) multiply_one<MR, NV>(acc, a, k + u, weight + u * NV * Vec::kLanes);
  }
  for (; k < depth; ++k, weight += NV * Vec::kLanes) multiply_one<MR, NV>(acc, a, k, weight);
}

#if defined(DYNOPS_ISA_BF16)
FORCE_INLINE __m512i broadcast_pair(const char* p) {
  int pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm512_set1_epi32(pair);
}

// The last of an odd number: reading a pair would pass the row's end.
FORCE_INLINE __m512i broadcast_single(const char* p) {
  uint16_t single;
  __builtin_memcpy(&single, p, 2);
  return _mm512_set1_epi32(single);
}

template <int MR, int NV, bool kSingle>
FORCE_INLINE void multiply_pair(Vec (&acc)[MR][NV], const char* const (&a)[MR], int64_t byte,
                                const char* weight) {
  __m512bh b[NV];
  UNROLL for (int v = 0; v < NV; ++v) b[v] = (__m512bh)_mm512_loadu_si512(weight + v * 64);
  UNROLL for (int i = 0; i < MR; ++i) {
    const __m512i x = kSingle ? broadcast_single(a[i] + byte) : broadcast_pair(a[i] + byte);
    UNROLL for (int v = 0; v < NV; ++v) acc[i][v].v = _mm512_dpbf16_ps(acc[i][v].v, (__m512bh)x, b[v]);
  }
}

// The same for bfloat16: vdpbf16ps multiplies pairs, so weights lie [depth / 2][columns][2].
template <int MR, int NV>
FORCE_INLINE void multiply_segment_bf16(Vec (&acc)[MR][NV], const char* const* in, int64_t in_offset,
                                        int depth, const char* weight) {
  const char* a[MR];
  UNROLL for (int i = 0; i < MR; ++i) a[i] = in[i] + in_offset;
  int64_t byte = 0;
  for (; byte < (depth & ~1) * 2; byte += 4, weight += NV * 64)
    multiply_pair<MR, NV, false>(acc, a, byte, weight);
  if (depth & 1) multiply_pair<MR, NV, true>(acc, a, byte, weight);
}
#endif

// Finishes one vector of a row: activation(gate * (scale * acc + shift) + residual).
FORCE_INLINE void finish(const Gemm& g, Vec acc, Vec scale, Vec shift, const RowBlock& rows, int row,
                         int64_t byte, int n) {
  Vec y = fma(acc, scale, shift);
  if (rows.gate) y = mul(y, broadcast(rows.gate[row]));
  if (rows.residual) y = add(y, load(rows.residual[row] + byte, g.out, n));
  store(rows.out[row] + byte, activate(y, g.activation), g.out, n);
}

template <int NV>
FORCE_INLINE void load_affine(const Gemm& g, int64_t column, Vec (&scale)[NV], Vec (&shift)[NV]) {
  UNROLL for (int v = 0; v < NV; ++v) {
    scale[v] = load(g.scale + column + v * Vec::kLanes);
    shift[v] = load(g.shift + column + v * Vec::kLanes);
  }
}

// What needs more than an affine map, or a ragged or half-precision store: through a small buffer,
// so that the accumulators' registers are free again and the code exists once.
template <int NV>
static __attribute__((noinline)) void finish_tile(const Gemm& g, const float* tile, const RowBlock& rows,
                                                  int first_row, int height, int64_t column, int width) {
  Vec scale[NV], shift[NV];
  load_affine<NV>(g, column, scale, shift);
  const int64_t element = size_of(g.out);
  for (int i = 0; i < height; ++i) {
    UNROLL for (int v = 0; v < NV; ++v) {
      const int n = width - v * Vec::kLanes;
      if (n <= 0) break;
      const Vec acc = load(tile + (i * NV + v) * Vec::kLanes);
      finish(g, acc, scale[v], shift[v], rows, first_row + i,
             g.out_offset + (column + v * Vec::kLanes) * element, n);
    }
  }
}

// The common case, from the accumulators' registers: whole vectors, no gate. A residual is float32.
template <int MR, int NV>
FORCE_INLINE void finish_whole(const Gemm& g, Vec (&acc)[MR][NV], char* const* out,
                               const char* const* residual, int64_t column) {
  Vec scale[NV], shift[NV];
  load_affine<NV>(g, column, scale, shift);
  const float limit = g.activation == Activation::kRelu6 ? 6.f : __builtin_inff();
  const bool clamp = g.activation != Activation::kNone;
  const int64_t byte = g.out_offset + column * size_of(g.out);
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int v = 0; v < NV; ++v) {
      acc[i][v] = fma(acc[i][v], scale[v], shift[v]);
      if (residual) acc[i][v] = add(acc[i][v], load((const float*)(residual[i] + byte) + v * Vec::kLanes));
      if (clamp) acc[i][v] = min_of(broadcast(limit), max_of(zero(), acc[i][v]));
    }
  }
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int v = 0; v < NV; ++v) {
      if (g.out == Dtype::kFloat32) {
        store((float*)(out[i] + byte) + v * Vec::kLanes, acc[i][v]);
      } else {
        store_bf16(out[i] + byte + v * Vec::kLanes * 2, acc[i][v]);
      }
    }
  }
}

// The rows that the next tile will read: scattered, so that no hardware prefetcher foresees them. Asked for
// a segment at a time, while this tile multiplies.
struct NextTile {
  const char* const* in;  // [segment][height], or null where the rows are in the cache already
  int height;
};

FORCE_INLINE void prefetch_segment(const Gemm& g, const NextTile& next, int segment) {
  const int64_t bytes = g.depth * size_of(g.in);
  const char* const* in = next.in + int64_t(segment) * next.height;
  for (int i = 0; i < next.height; ++i) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(in[i] + g.in_offset + b, 0, 2);
  }
}

// One tile: MR rows by NV vectors of columns.
template <int MR, int NV, bool kDot>
static __attribute__((noinline)) void gemm_tile(const Gemm& g, const RowBlock& rows, const char* const* in,
                                                int first_row, const char* panel, int64_t column, int width,
                                                const NextTile& next) {
  const int64_t out_byte = g.out_offset + column * size_of(g.out);
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int v = 0; v < NV; ++v) __builtin_prefetch(rows.out[first_row + i] + out_byte + v * 64, 1, 3);
  }
  Vec acc[MR][NV];
  UNROLL for (int i = 0; i < MR; ++i) { UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = zero(); }
  for (int s = 0; s < g.segments; ++s, in += MR) {
    if (next.in) prefetch_segment(g, next, s);
    const int64_t start = g.weight_start[s] * NV * Vec::kLanes;
#if defined(DYNOPS_ISA_BF16)
    if constexpr (kDot) {
      multiply_segment_bf16<MR, NV>(acc, in, g.in_offset, g.depth, panel + start * 2);
      continue;
    }
#endif
    multiply_segment<MR, NV>(acc, in, g.in_offset, g.depth, (const float*)panel + start);
  }
  const bool whole = width == NV * Vec::kLanes && !rows.gate;
  const bool fast_out = g.out == Dtype::kFloat32 || (g.out == Dtype::kBFloat16 && !rows.residual);
  if (!whole || !fast_out || g.activation > Activation::kRelu6) {
    float tile[MR * NV * Vec::kLanes];
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int v = 0; v < NV; ++v) store(tile + (i * NV + v) * Vec::kLanes, acc[i][v]);
    }
    return finish_tile<NV>(g, tile, rows, first_row, MR, column, width);
  }
  finish_whole<MR, NV>(g, acc, rows.out + first_row, rows.residual ? rows.residual + first_row : nullptr,
                       column);
}

using TileFunction = void (*)(const Gemm&, const RowBlock&, const char* const*, int, const char*, int64_t,
                              int, const NextTile&);

template <int NV, bool kDot>
static TileFunction tile_function(int height) {
  static constexpr TileFunction table[kTileRows] = {
      gemm_tile<1, NV, kDot>, gemm_tile<2, NV, kDot>,  gemm_tile<3, NV, kDot>,  gemm_tile<4, NV, kDot>,
      gemm_tile<5, NV, kDot>, gemm_tile<6, NV, kDot>,  gemm_tile<7, NV, kDot>,  gemm_tile<8, NV, kDot>,
      gemm_tile<9, NV, kDot>, gemm_tile<10, NV, kDot>, gemm_tile<11, NV, kDot>, gemm_tile<12, NV, kDot>};
  return table[height - 1];
}

template <bool kDot>
static void gemm_panels(const Gemm& g, const RowBlock& rows, int64_t begin, int64_t end) {
  const TileSplit split(rows.rows);
  const int64_t element = kDot ? 2 : 4;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t column = p * kPanelWidth;
    const int width = int(g.layout.columns - column < kPanelWidth ? g.layout.columns - column : kPanelWidth);
    const char* panel = g.weight + column * g.layout.depth * element;
    const char* const* in = rows.in;
    for (int tile = 0, row = 0; tile < split.tiles; ++tile) {
      const int height = split.height(tile);
      const TileFunction run = width > (kPanelVectors - 1) * Vec::kLanes
                                   ? tile_function<kPanelVectors, kDot>(height)
                                   : tile_function<1, kDot>(height);
      const bool more = !rows.near && p == begin && tile + 1 < split.tiles;
      const NextTile next{more ? in + int64_t(height) * g.segments : nullptr,
                          more ? split.height(tile + 1) : 0};
      run(g, rows, in, row, panel, column, width, next);
      in += int64_t(height) * g.segments;
      row += height;
    }
  }
}

static void gemm(const Gemm& g, const RowBlock& rows, int64_t begin, int64_t end) {
#if defined(DYNOPS_ISA_BF16)
  if (g.in == Dtype::kBFloat16) return gemm_panels<true>(g, rows, begin, end);
#endif
  gemm_panels<false>(g, rows, begin, end);
}

// ------------------------------------------------------------------------------------- Winograd

// F(2x2, 3x3) of Lavin and Gray (CVPR 2016): 4 outputs from 4 x 4 inputs by 16 products instead of 36.
// B^T d of four values.
FORCE_INLINE void winograd_rows(const Vec (&d)[4], Vec (&t)[4]) {
  t[0] = sub(d[0], d[2]);
  t[1] = add(d[1], d[2]);
  t[2] = sub(d[2], d[1]);
  t[3] = sub(d[1], d[3]);
}

static void winograd_input(const char* const* in, int32_t tiles, int64_t channels, float* v, int64_t stride) {
  for (int i = 0; i < tiles; ++i, in += 16, v += channels) {
    for (int64_t c = 0; c < channels; c += Vec::kLanes) {
      const int n = int(channels - c < Vec::kLanes ? channels - c : Vec::kLanes);
      Vec half[4][4];  // [column][row of B^T d]
      UNROLL for (int x = 0; x < 4; ++x) {
        Vec column[4];
        UNROLL for (int y = 0; y < 4; ++y) column[y] = load(in[y * 4 + x] + c * 4, Dtype::kFloat32, n);
        winograd_rows(column, half[x]);
      }
      UNROLL for (int y = 0; y < 4; ++y) {
        const Vec row[4] = {half[0][y], half[1][y], half[2][y], half[3][y]};
        Vec out[4];
        winograd_rows(row, out);
        UNROLL for (int x = 0; x < 4; ++x) {
          store((char*)(v + (y * 4 + x) * stride + c), out[x], Dtype::kFloat32, n);
        }
      }
    }
  }
}

// A^T m of four values.
FORCE_INLINE void winograd_sums(Vec m0, Vec m1, Vec m2, Vec m3, Vec& y0, Vec& y1) {
  const Vec plus = add(m1, m2), minus = sub(m1, m2);
  y0 = add(m0, plus);
  y1 = sub(minus, m3);
}

static void winograd_output(const Gemm& g, const RowBlock& rows, const float* m, int64_t stride,
                            int64_t panel) {
  const int64_t column = panel * kPanelWidth, left = g.layout.columns - column;
  const int width = int(left < kPanelWidth ? left : kPanelWidth);
  for (int i = 0; i < rows.rows / 4; ++i, m += kPanelWidth) {
    for (int v = 0; v * Vec::kLanes < width; ++v) {
      const int n = width - v * Vec::kLanes;
      const int64_t c = column + v * Vec::kLanes;
      Vec half[2][4], y[2][2];
      UNROLL for (int x = 0; x < 4; ++x) {
        const float* from = m + x * stride + v * Vec::kLanes;
        winograd_sums(load(from), load(from + 4 * stride), load(from + 8 * stride), load(from + 12 * stride),
                      half[0][x], half[1][x]);
      }
      UNROLL for (int r = 0; r < 2; ++r) {
        winograd_sums(half[r][0], half[r][1], half[r][2], half[r][3], y[r][0], y[r][1]);
      }
      const Vec scale = load(g.scale + c), shift = load(g.shift + c);
      UNROLL for (int j = 0; j < 4; ++j) {
        if (rows.out[i * 4 + j]) finish(g, y[j / 2][j % 2], scale, shift, rows, i * 4 + j, c * 4, n);
      }
    }
  }
}

// ------------------------------------------------------------------------------------ depthwise

template <Dtype kIn>
FORCE_INLINE Vec load_as(const char* p) {
  if constexpr (kIn == Dtype::kFloat32) return load((const float*)p);
  if constexpr (kIn == Dtype::kBFloat16) return load_bf16(p);
  return load_f16(p);
}

template <Dtype kOut>
FORCE_INLINE void store_as(char* p, Vec a) {
  if constexpr (kOut == Dtype::kFloat32) return store((float*)p, a);
  if constexpr (kOut == Dtype::kBFloat16) return store_bf16(p, a);
  store_f16(p, a);
}

FORCE_INLINE int left_of(int64_t end, int64_t c) {
  return int(end - c < Vec::kLanes ? end - c : Vec::kLanes);
}

FORCE_INLINE void finish_depthwise(const Depthwise& d, const RowBlock& rows, int row, Vec acc, int64_t c,
                                   int n) {
  Vec y = fma(acc, load(d.scale + c), load(d.shift + c));
  if (rows.gate) y = mul(y, broadcast(rows.gate[row]));
  const int64_t byte = c * size_of(d.out);
  if (rows.residual) y = add(y, load(rows.residual[row] + byte, d.out, n));
  store(rows.out[row] + byte, activate(y, d.activation), d.out, n);
}

// A few rows: where they are read ([height][segment]) and written.
struct DepthwiseTile {
  const char* const* in;
  int first_row, height;
};

// A channel never meets another, so the accumulators run along channels. NV vectors of all taps' weights
// stay in registers (9 taps x 2 vectors of 32) while the rows pass by. Three sums a vector: one chain of nine
// FMAs took 5.7 ns a vector where these take 4.6, and the loads of the taps alone 2.5.
template <Dtype kIn, int NV, bool kPlain>
FORCE_INLINE void depthwise_9(const Depthwise& d, const RowBlock& rows, const DepthwiseTile& tile,
                              int64_t channel) {
  constexpr int kTaps = 9, kChains = 3;
  constexpr int64_t kElement = kIn == Dtype::kFloat32 ? 4 : 2, kVector = Vec::kLanes * kElement;
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

// Any number of taps: NV vectors side by side hide the FMA's latency.
template <Dtype kIn, int NV>
FORCE_INLINE void depthwise_any(const Depthwise& d, const RowBlock& rows, const DepthwiseTile& tile,
                                int64_t channel) {
  constexpr int64_t kElement = kIn == Dtype::kFloat32 ? 4 : 2;
  for (int i = 0; i < tile.height; ++i) {
    const char* const* in = tile.in + int64_t(i) * d.segments;
    Vec acc[NV];
    UNROLL for (int v = 0; v < NV; ++v) acc[v] = zero();
    for (int s = 0; s < d.segments; ++s) {
      const float* w = d.weight + d.taps[s] * d.channels + channel;
      UNROLL for (int v = 0; v < NV; ++v) {
        const Vec x = load_as<kIn>(in[s] + (channel + v * Vec::kLanes) * kElement);
        acc[v] = fma(x, load(w + v * Vec::kLanes), acc[v]);
      }
    }
    UNROLL for (int v = 0; v < NV; ++v) {
      finish_depthwise(d, rows, tile.first_row + i, acc[v], channel + v * Vec::kLanes, Vec::kLanes);
    }
  }
}

// The ragged last channels.
FORCE_INLINE void depthwise_ragged(const Depthwise& d, const RowBlock& rows, const DepthwiseTile& tile,
                                   int64_t channel, int n) {
  for (int i = 0; i < tile.height; ++i) {
    Vec acc = zero();
    for (int s = 0; s < d.segments; ++s) {
      const char* w = (const char*)(d.weight + d.taps[s] * d.channels + channel);
      const Vec x = load(tile.in[i * d.segments + s] + channel * size_of(d.in), d.in, n);
      acc = fma(x, load(w, Dtype::kFloat32, n), acc);
    }
    finish_depthwise(d, rows, tile.first_row + i, acc, channel, n);
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
    if (c < d.channels) depthwise_ragged(d, rows, tile, c, left_of(d.channels, c));
  }
}

template <Dtype kIn>
static void depthwise_of(const Depthwise& d, const RowBlock& rows) {
  if (!rows.gate && !rows.residual && d.activation == Activation::kNone)
    return depthwise_typed<kIn, true>(d, rows);
  depthwise_typed<kIn, false>(d, rows);
}

static void depthwise(const Depthwise& d, const RowBlock& rows) {
  if (d.in == Dtype::kFloat32) return depthwise_of<Dtype::kFloat32>(d, rows);
  if (d.in == Dtype::kBFloat16) return depthwise_of<Dtype::kBFloat16>(d, rows);
  depthwise_of<Dtype::kFloat16>(d, rows);
}

template <Dtype kType, int NV>
FORCE_INLINE void pairs_columns(const DepthwisePairs& d, int row, int64_t channel, int n) {
  constexpr int64_t kElement = kType == Dtype::kFloat32 ? 4 : 2;
  const char* const* in = d.in + int64_t(row) * d.taps;
  const int32_t* tap = d.tap + int64_t(row) * d.taps;
  Vec acc[NV];
  UNROLL for (int v = 0; v < NV; ++v) acc[v] = zero();
  for (int j = 0; j < d.pairs[row]; ++j) {
    const float* w = d.weight + tap[j] * d.channels + channel;
    UNROLL for (int v = 0; v < NV; ++v) {
      const int64_t c = v * Vec::kLanes;
      if (n >= Vec::kLanes) {
        acc[v] = fma(load_as<kType>(in[j] + (channel + c) * kElement), load(w + c), acc[v]);
      } else {
        acc[v] =
            fma(load(in[j] + channel * kElement, kType, n), load((const char*)w, Dtype::kFloat32, n), acc[v]);
      }
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
  if (d.dtype == Dtype::kFloat32) return depthwise_pairs_typed<Dtype::kFloat32>(d);
  if (d.dtype == Dtype::kBFloat16) return depthwise_pairs_typed<Dtype::kBFloat16>(d);
  depthwise_pairs_typed<Dtype::kFloat16>(d);
}

// Adds kTaps x NV sums, kept in registers over all rows: a gradient is loaded once for all taps.
template <Dtype kIn, int kTaps, int NV>
FORCE_INLINE void depthwise_outer(int rows, int segments, const char* const* x, const char* const* grad,
                                  int64_t channel, int64_t channels, float* dw) {
  constexpr int64_t kElement = kIn == Dtype::kFloat32 ? 4 : 2, kVector = Vec::kLanes * kElement;
  const int64_t byte = channel * kElement;
  Vec acc[kTaps][NV];
  UNROLL for (int t = 0; t < kTaps; ++t) { UNROLL for (int v = 0; v < NV; ++v) acc[t][v] = zero(); }
  for (int k = 0; k < rows; ++k, x += segments) {
    Vec dy[NV];
    UNROLL for (int v = 0; v < NV; ++v) dy[v] = load_as<kIn>(grad[k] + byte + v * kVector);
    UNROLL for (int t = 0; t < kTaps; ++t) {
      UNROLL for (int v = 0; v < NV; ++v) acc[t][v] =
          fma(load_as<kIn>(x[t] + byte + v * kVector), dy[v], acc[t][v]);
    }
  }
  UNROLL for (int t = 0; t < kTaps; ++t) {
    float* to = dw + t * channels + channel;
    UNROLL for (int v = 0; v < NV; ++v)
        store(to + v * Vec::kLanes, add(acc[t][v], load(to + v * Vec::kLanes)));
  }
}

FORCE_INLINE void depthwise_outer_ragged(int rows, int segments, const char* const* x,
                                         const char* const* grad, Dtype dtype, int64_t channel, int n,
                                         float* dw) {
  const int64_t byte = channel * size_of(dtype);
  Vec acc = load((const char*)(dw + channel), Dtype::kFloat32, n);
  for (int k = 0; k < rows; ++k, x += segments) {
    acc = fma(load(x[0] + byte, dtype, n), load(grad[k] + byte, dtype, n), acc);
  }
  store((char*)(dw + channel), acc, Dtype::kFloat32, n);
}

template <Dtype kIn>
static void depthwise_weight_grad_typed(int32_t rows, int32_t segments, const char* const* x,
                                        const char* const* grad, int64_t channels, float* dw) {
  constexpr int kLanes = Vec::kLanes;
  const int64_t pairs = channels / (2 * kLanes) * (2 * kLanes), whole = channels / kLanes * kLanes;
  int s = 0;
  for (; s + 9 <= segments; s += 9) {
    float* to = dw + s * channels;
    int64_t c = 0;
    for (; c < pairs; c += 2 * kLanes)
      depthwise_outer<kIn, 9, 2>(rows, segments, x + s, grad, c, channels, to);
    for (; c < whole; c += kLanes) depthwise_outer<kIn, 9, 1>(rows, segments, x + s, grad, c, channels, to);
  }
  for (int t = s; t < segments; ++t) {
    float* to = dw + t * channels;
    int64_t c = 0;
    for (; c < pairs; c += 2 * kLanes)
      depthwise_outer<kIn, 1, 2>(rows, segments, x + t, grad, c, channels, to);
    for (; c < whole; c += kLanes) depthwise_outer<kIn, 1, 1>(rows, segments, x + t, grad, c, channels, to);
  }
  for (int t = 0; t < segments && whole < channels; ++t) {
    depthwise_outer_ragged(rows, segments, x + t, grad, kIn, whole, left_of(channels, whole),
                           dw + t * channels);
  }
}

static void depthwise_weight_grad(int32_t rows, int32_t segments, const char* const* x,
                                  const char* const* grad, Dtype dtype, int64_t channels, float* dw) {
  if (dtype == Dtype::kFloat32)
    return depthwise_weight_grad_typed<Dtype::kFloat32>(rows, segments, x, grad, channels, dw);
  if (dtype == Dtype::kBFloat16)
    return depthwise_weight_grad_typed<Dtype::kBFloat16>(rows, segments, x, grad, channels, dw);
  depthwise_weight_grad_typed<Dtype::kFloat16>(rows, segments, x, grad, channels, dw);
}

// -------------------------------------------------------------------------------- weight gradient

template <int MR, int NV>
static __attribute__((noinline)) void outer_tile(const OuterProduct& p, const float* grad, float* dw) {
  Vec acc[MR][NV];
  UNROLL for (int i = 0; i < MR; ++i) { UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = zero(); }
  const float* x = p.x;
  for (int k = 0; k < p.rows; ++k, grad += MR, x += kPanelWidth) {
    Vec b[NV];
    UNROLL for (int v = 0; v < NV; ++v) b[v] = load(x + v * Vec::kLanes);
    UNROLL for (int i = 0; i < MR; ++i) {
      const Vec a = broadcast(grad[i]);
      UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = fma(a, b[v], acc[i][v]);
    }
  }
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int v = 0; v < NV; ++v) {
      const int n = p.columns - v * Vec::kLanes;
      if (n <= 0) break;
      char* to = (char*)(dw + i * p.dw_stride + v * Vec::kLanes);
      store(to, p.add ? add(acc[i][v], load(to, Dtype::kFloat32, n)) : acc[i][v], Dtype::kFloat32, n);
    }
  }
}

using OuterFunction = void (*)(const OuterProduct&, const float*, float*);

template <int NV>
static OuterFunction outer_function(int height) {
  static constexpr OuterFunction table[kTileRows] = {
      outer_tile<1, NV>, outer_tile<2, NV>,  outer_tile<3, NV>,  outer_tile<4, NV>,
      outer_tile<5, NV>, outer_tile<6, NV>,  outer_tile<7, NV>,  outer_tile<8, NV>,
      outer_tile<9, NV>, outer_tile<10, NV>, outer_tile<11, NV>, outer_tile<12, NV>};
  return table[height - 1];
}

static void outer_product(const OuterProduct& p) {
  const bool wide = p.columns > (kPanelVectors - 1) * Vec::kLanes;
  const float* grad = p.grad;
  float* dw = p.dw;
  for (int tile = 0; tile < p.tile_end; ++tile) {
    const int height = p.outputs.height(tile);
    if (tile >= p.tile_begin) {
      (wide ? outer_function<kPanelVectors>(height) : outer_function<1>(height))(p, grad, dw);
    }
    grad += int64_t(height) * p.rows;
    dw += height * p.dw_stride;
  }
}

static void gather_columns(const char* const* in, int32_t rows, int64_t offset, Dtype dtype, int32_t columns,
                           float* to) {
  const int64_t element = size_of(dtype);
  for (int i = 0; i < rows; ++i, to += kPanelWidth) {
    UNROLL for (int v = 0; v < kPanelVectors; ++v) {
      const int n = columns - v * Vec::kLanes;
      if (n <= 0) break;
      store(to + v * Vec::kLanes, load(in[i] + offset + v * Vec::kLanes * element, dtype, n));
    }
  }
}

// --------------------------------------------------------------------------------- output masks

constexpr int kDotRows = 8;  // 8 chains hide the FMA's latency: two of four cycles each a cycle

// Loads along the depth: floats, or pairs of bfloat16 where there is an instruction for them.
template <Dtype kType>
struct DepthVector {
  static constexpr int kElement = kType == Dtype::kFloat32 ? 4 : 2;
  static constexpr int kLanes = Vec::kLanes, kBytes = kLanes * kElement;
  Vec v;
  FORCE_INLINE DepthVector whole(const char* p) { return {load_as<kType>(p)}; }
  FORCE_INLINE DepthVector part(const char* p, int n) { return {load(p, kType, n)}; }
  FORCE_INLINE Vec multiply(DepthVector a, DepthVector b, Vec sum) { return fma(a.v, b.v, sum); }
};

#if defined(DYNOPS_ISA_BF16)
template <>
struct DepthVector<Dtype::kBFloat16> {
  static constexpr int kElement = 2, kLanes = 32, kBytes = 64;
  __m512i v;
  FORCE_INLINE DepthVector whole(const char* p) { return {_mm512_loadu_si512(p)}; }
  FORCE_INLINE DepthVector part(const char* p, int n) {
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
  const char* weight = d.weight;
  for (int s = 0; s < d.segments; ++s) {
    int64_t at = d.segment[s];
    int k = 0;
    for (; k + kChains * Depth::kLanes <= d.depth; k += kChains * Depth::kLanes) {
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
    for (; k < d.depth; k += Depth::kLanes) {
      const int n = d.depth - k < Depth::kLanes ? d.depth - k : Depth::kLanes;
      const Depth w = Depth::part(weight, n);
      UNROLL for (int i = 0; i < MR; ++i) acc[i][0] =
          Depth::multiply(Depth::part(x[i] + at, n), w, acc[i][0]);
      at += n * Depth::kElement, weight += n * Depth::kElement;
    }
  }
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
  if (d.dtype == Dtype::kFloat32) return dots_typed<Dtype::kFloat32>(d);
  if (d.dtype == Dtype::kBFloat16) return dots_typed<Dtype::kBFloat16>(d);
  dots_typed<Dtype::kFloat16>(d);
}

// --------------------------------------------------------------------------------- local filters

// NV vectors of each of kGroups groups: as many sums as hide the latency, a filter's value for NV of them.
template <Dtype kType, int kGroups, int NV>
FORCE_INLINE void local_columns(const LocalFilter& f, int64_t group, int64_t channel) {
  constexpr int64_t kElement = kType == Dtype::kFloat32 ? 4 : 2, kVector = Vec::kLanes * kElement;
  const int64_t byte = channel * kElement, group_bytes = f.group * kElement;
  Vec acc[kGroups][NV];
  UNROLL for (int g = 0; g < kGroups; ++g) { UNROLL for (int v = 0; v < NV; ++v) acc[g][v] = zero(); }
  for (int j = 0; j < f.pairs; ++j) {
    const char* in = f.in + f.in_at[j] + byte;
    const float* filter = f.filter + f.filter_at[j] + group * f.filter_step;
    UNROLL for (int g = 0; g < kGroups; ++g) {
      const Vec k = broadcast(filter[g * f.filter_step]);
      UNROLL for (int v = 0; v < NV; ++v) {
        acc[g][v] = fma(k, load_as<kType>(in + g * group_bytes + v * kVector), acc[g][v]);
      }
    }
  }
  UNROLL for (int g = 0; g < kGroups; ++g) {
    UNROLL for (int v = 0; v < NV; ++v)
        store_as<kType>(f.out + byte + g * group_bytes + v * kVector, acc[g][v]);
  }
}

// Less than a vector of a group.
template <Dtype kType>
FORCE_INLINE void local_ragged(const LocalFilter& f, int64_t group, int64_t channel, int n) {
  const int64_t byte = channel * size_of(kType);
  Vec acc = zero();
  for (int j = 0; j < f.pairs; ++j) {
    const Vec k = broadcast(f.filter[f.filter_at[j] + group * f.filter_step]);
    acc = fma(k, load(f.in + f.in_at[j] + byte, kType, n), acc);
  }
  store(f.out + byte, acc, kType, n);
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
      const Vec k = load((const char*)(f.wide + j * channels + c), Dtype::kFloat32, n);
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
    if (c < end) local_ragged<kType>(f, group, c, left_of(end, c));
  }
}

static void local_filter(const LocalFilter& f) {
  if (f.dtype == Dtype::kFloat32) return local_filter_typed<Dtype::kFloat32>(f);
  if (f.dtype == Dtype::kBFloat16) return local_filter_typed<Dtype::kBFloat16>(f);
  local_filter_typed<Dtype::kFloat16>(f);
}

// ------------------------------------------------------------------------------------ conversion

static void to_float(const char* from, Dtype dtype, int64_t n, float* to) {
  const int64_t element = size_of(dtype);
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const int left = left_of(n, i);
    store((char*)(to + i), load(from + i * element, dtype, left), Dtype::kFloat32, left);
  }
}

static void from_float(const float* from, int64_t n, Dtype dtype, char* to) {
  const int64_t element = size_of(dtype);
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const int left = left_of(n, i);
    store(to + i * element, load((const char*)(from + i), Dtype::kFloat32, left), dtype, left);
  }
}

static void add_to(const char* from, Dtype dtype, int64_t n, float* to) {
  const int64_t element = size_of(dtype);
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const int left = left_of(n, i);
    const Vec sum =
        add(load(from + i * element, dtype, left), load((const char*)(to + i), Dtype::kFloat32, left));
    store((char*)(to + i), sum, Dtype::kFloat32, left);
  }
}

// --------------------------------------------------------------------------------------- packing

template <Dtype kIn>
static void pack_columns_of(const PackColumns& p) {
  constexpr int kLanes = Vec::kLanes;
  constexpr int64_t kElement = kIn == Dtype::kFloat32 ? 4 : 2, kAhead = 512;
  for (int32_t first = 0; first < p.count; first += kLanes) {
    const int n = left_of(p.count, first);
    for (int32_t c = 0; c < p.width; c += kLanes) {
      const char* from = p.from + (c * p.step + first) * kElement;
      const int columns = p.columns - c;
      Vec m[kLanes];
      UNROLL for (int i = 0; i < kLanes; ++i) {
        // more rows than the hardware follows: 8 weights of 512 x 512 x 9 from memory, 6.8 ms instead of 8.6
        __builtin_prefetch(from + i * p.step * kElement + kAhead, 0, 2);
        m[i] = i < columns ? load(from + i * p.step * kElement, kIn, n) : zero();
      }
      transpose(m);
      UNROLL for (int i = 0; i < kLanes; ++i) {
        if (i < n) store(p.to + int64_t(p.row[first + i]) * p.width + c, m[i]);
      }
    }
  }
}

static void pack_columns(const PackColumns& p) {
  if (p.dtype == Dtype::kFloat32) return pack_columns_of<Dtype::kFloat32>(p);
  if (p.dtype == Dtype::kBFloat16) return pack_columns_of<Dtype::kBFloat16>(p);
  pack_columns_of<Dtype::kFloat16>(p);
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

// kOut outputs of one pass over the terms, which come from the L2 cache or beyond.
template <Dtype kType, int kOut>
static void mix_of(const Mixture& m, const float* share, char* const* to) {
  constexpr int kLanes = Vec::kLanes, kVectors = kOut > 1 ? 2 : 4;
  constexpr int64_t kElement = kType == Dtype::kFloat32 ? 4 : 2, kVector = kLanes * kElement;
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

extern const Kernels table;
const Kernels table = {DYNOPS_ISA_NAME,
                       kPanelWidth,
                       Vec::kLanes,
#if defined(DYNOPS_ISA_BF16)
                       true,
#else
                       false,
#endif
                       fill,
                       compress,
                       expand,
                       expand_add,
                       pick_panel,
                       gemm,
                       winograd_input,
                       winograd_output,
                       depthwise,
                       depthwise_pairs,
                       depthwise_weight_grad,
                       outer_product,
                       gather_columns,
                       dots,
                       local_filter,
                       to_float,
                       from_float,
                       add_to,
                       pack_columns,
                       pack_winograd,
                       pack_pairs,
                       mix};
