// The gradient of a weight. Included by kernels.inc.h.

template <int MR, int NV>
static __attribute__((noinline)) void outer_tile(const OuterProduct& p, const float* grad, float* dw) {
  Vec acc[MR][NV];
  UNROLL for (int i = 0; i < MR; ++i) { UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = zero(); }
  const float* x = p.x;
  KeptSums<MR, NV> kept;
  const int parts = (p.rows + p.length - 1) / p.length, part = parts ? (p.rows + parts - 1) / parts : 1;
  for (int first = 0; first < p.rows; first += part) {
    if (first) kept.take(acc);
    const int end = p.rows - first < part ? p.rows : first + part;
    for (int k = first; k < end; ++k, grad += MR, x += kPanelWidth) {
      Vec b[NV];
      UNROLL for (int v = 0; v < NV; ++v) b[v] = load(x + v * Vec::kLanes);
      UNROLL for (int i = 0; i < MR; ++i) {
        const Vec a = broadcast(grad[i]);
        UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = fma(a, b[v], acc[i][v]);
      }
    }
  }
  if (!kept.empty) kept.add_to(acc);
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
  static constexpr auto table =
      by_height<kTileRows>([]<int MR>() -> OuterFunction { return outer_tile<MR, NV>; });
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
