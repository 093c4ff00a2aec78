// The indirect GEMM and Winograd's transforms around it. Included by kernels.inc.h.

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

// Elements of a segment that go into one sum: nearly equal parts of a long one, in whole rounds of four.
FORCE_INLINE int part_of_sum(int depth) {
  if (depth <= kSumLength) return depth;
  const int parts = (depth + kSumLength - 1) / kSumLength;
  return ((depth + parts - 1) / parts + 3) / 4 * 4;
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

template <int NV>
FORCE_INLINE void load_affine(const Gemm& g, int64_t column, Vec (&scale)[NV], Vec (&shift)[NV]) {
  UNROLL for (int v = 0; v < NV; ++v) {
    scale[v] = load(g.scale + column + v * Vec::kLanes);
    shift[v] = load(g.shift + column + v * Vec::kLanes);
  }
}

// Finishes a tile that needs more than an affine map, or a ragged or half-precision store. Its sums come
// through a small buffer, so that the accumulators' registers are free again and the code exists once.
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

// Asks for what lies ahead, in equal shares at each kAheadDepth of a tile's depth: a burst would wait.
constexpr int kAheadDepth = 128;
struct Requests {
  const char *at, *row_end;
  int64_t row_bytes, skip;  // skip: from the end of a row to the next one
  int32_t rows, each;

  Requests(const Gemm& g, int64_t tiles)
      : at(g.ahead.from),
        row_end(at + g.ahead.bytes),
        row_bytes(g.ahead.bytes),
        skip(g.ahead.stride - g.ahead.bytes),
        rows(at ? g.ahead.rows : 0) {
    const int64_t times = tiles * g.segments;
    const int64_t lines = rows * ((row_bytes + 63) / 64);
    each = int32_t(times ? (lines + times - 1) / times : 0);
  }
  void ask() {
    for (int32_t i = 0; i < each && rows > 0; ++i) {
      __builtin_prefetch(at, 0, 2);
      at += 64;
      if (at < row_end) continue;
      at = row_end + skip;
      row_end = at + row_bytes;
      --rows;
    }
  }
};

// True for a segment of a tile whose rows are all inactive or outside of the input: most of those of
// DeepLab's dilated convolutions.
template <int MR>
FORCE_INLINE bool is_zero(const char* const* in, const char* zero) {
  if (in[0] != zero) return false;
  bool same = true;
  UNROLL for (int i = 1; i < MR; ++i) same &= in[i] == zero;
  return same;
}

// One tile: MR rows by NV vectors of columns.
template <int MR, int NV, bool kDot>
static __attribute__((noinline)) void gemm_tile(const Gemm& g, const RowBlock& rows, const char* const* in,
                                                int first_row, const char* panel, int64_t column, int width,
                                                const NextTile& next, Requests& requests) {
  const int64_t out_byte = g.out_offset + column * size_of(g.out);
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int v = 0; v < NV; ++v) __builtin_prefetch(rows.out[first_row + i] + out_byte + v * 64, 1, 3);
  }
  Vec acc[MR][NV];
  UNROLL for (int i = 0; i < MR; ++i) { UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = zero(); }
  KeptSums<MR, NV> kept;
  const int part = part_of_sum(g.depth);
  int length = 0;
  for (int s = 0; s < g.segments; ++s, in += MR) {
    if (next.in) prefetch_segment(g, next, s);
    requests.ask();
    const int64_t start = g.weight_start[s] * NV * Vec::kLanes;
    const bool skip = is_zero<MR>(in, g.zero);
#if defined(DYNOPS_ISA_BF16)
    if constexpr (kDot) {
      if (skip) continue;
      multiply_segment_bf16<MR, NV>(acc, in, g.in_offset, g.depth, panel + start * 2);
      continue;
    }
#endif
    const float* weight = (const float*)panel + start;
    for (int k = 0; k < g.depth; k += part) {
      const int depth = g.depth - k < part ? g.depth - k : part;
      if (length + depth > kSumLength) {
        kept.take(acc);
        length = 0;
      }
      // the sums' lengths stay, so that a row's result does not depend on its neighbours in the tile
      if (!skip) multiply_segment<MR, NV>(acc, in, g.in_offset + k * 4, depth, weight + k * NV * Vec::kLanes);
      length += depth;
    }
  }
  if (!kept.empty) kept.add_to(acc);
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
                              int, const NextTile&, Requests&);

template <int NV, bool kDot, int kMost = kTileRows>
static TileFunction tile_function(int height) {
  static constexpr auto table =
      by_height<kMost>([]<int MR>() -> TileFunction { return gemm_tile<MR, NV, kDot>; });
  return table[height - 1];
}

template <bool kDot>
static void gemm_panels(const Gemm& g, const RowBlock& rows, int64_t begin, int64_t end) {
  const TileSplit split(rows.rows);
  const int64_t element = kDot ? 2 : 4;
  Requests requests(g, split.tiles * (end - begin));
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
      run(g, rows, in, row, panel, column, width, next, requests);
      in += int64_t(height) * g.segments;
      row += height;
    }
  }
}

template <bool kDot>
static TileFunction wide_tile_function(int vectors, int height) {
#if defined(DYNOPS_ISA_AVX512)
  if (vectors == 3) return tile_function<3, kDot, 8>(height);
  if (vectors == 4) return tile_function<4, kDot, 6>(height);
#endif
  return vectors == kPanelVectors ? tile_function<kPanelVectors, kDot>(height)
                                  : tile_function<1, kDot>(height);
}

// One panel of g.vectors vectors.
template <bool kDot>
static void gemm_wide(const Gemm& g, const RowBlock& rows) {
  const TileSplit split(rows.rows, tile_rows(g.vectors));
  const char* const* in = rows.in;
  Requests requests(g, split.tiles);
  for (int tile = 0, row = 0; tile < split.tiles; ++tile) {
    const int height = split.height(tile);
    wide_tile_function<kDot>(g.vectors, height)(g, rows, in, row, g.weight, 0, int(g.layout.columns),
                                                NextTile{}, requests);
    in += int64_t(height) * g.segments;
    row += height;
  }
}

static void gemm(const Gemm& g, const RowBlock& rows, int64_t begin, int64_t end) {
#if defined(DYNOPS_ISA_BF16)
  if (g.in == Dtype::kBFloat16) {
    return g.vectors ? gemm_wide<true>(g, rows) : gemm_panels<true>(g, rows, begin, end);
  }
#endif
  g.vectors ? gemm_wide<false>(g, rows) : gemm_panels<false>(g, rows, begin, end);
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
