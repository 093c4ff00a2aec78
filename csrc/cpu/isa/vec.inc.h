// A vector of floats for the instruction set that the including file was opened for.
//
// Included once for each instruction set, inside its namespace and after its target pragma: no
// include guard, and nothing but intrinsics below.

#if defined(DYNOPS_ISA_AVX512)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
};
FORCE_INLINE __mmask16 lanes_mask(int n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }
FORCE_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
FORCE_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
FORCE_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FORCE_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_mask(n), p)}; }
FORCE_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FORCE_INLINE void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, lanes_mask(n), a.v); }
FORCE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max and min return their second operand where one is NaN, so a NaN in `x` survives a clamp.
FORCE_INLINE Vec max_of(Vec bound, Vec x) { return {_mm512_max_ps(bound.v, x.v)}; }
FORCE_INLINE Vec min_of(Vec bound, Vec x) { return {_mm512_min_ps(bound.v, x.v)}; }
// x where a < b (a <= b), else 0: as torch.where, NaN compares false.
FORCE_INLINE Vec where_less(Vec a, Vec b, Vec x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
FORCE_INLINE Vec where_at_most(Vec a, Vec b, Vec x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ), x.v)};
}
FORCE_INLINE Vec round_to_integer(Vec a) { return {_mm512_roundscale_ps(a.v, 0x08)}; }
FORCE_INLINE Vec power_of_two(Vec n) {  // 2^n for integral n in [-126, 127]
  const __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 23))};
}
FORCE_INLINE Vec widen_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
FORCE_INLINE Vec load_bf16(const char* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
FORCE_INLINE Vec load_bf16(const char* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(lanes_mask(n), p));
}
FORCE_INLINE Vec load_f16(const char* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
FORCE_INLINE Vec load_f16(const char* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_mask(n), p))};
}
FORCE_INLINE Vec widen_i8(__m128i q) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q))}; }
FORCE_INLINE Vec load_i8(const char* p) { return widen_i8(_mm_loadu_si128((const __m128i*)p)); }
FORCE_INLINE Vec load_i8(const char* p, int n) { return widen_i8(_mm_maskz_loadu_epi8(lanes_mask(n), p)); }
FORCE_INLINE __m256i narrow_bf16(Vec a) {  // round to nearest even; NaN stays NaN
#if defined(DYNOPS_ISA_BF16)
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(rounded, 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
FORCE_INLINE void store_bf16(char* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(a)); }
FORCE_INLINE void store_bf16(char* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, lanes_mask(n), narrow_bf16(a));
}
FORCE_INLINE void store_f16(char* p, Vec a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
FORCE_INLINE void store_f16(char* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, lanes_mask(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(DYNOPS_ISA_AVX2)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
};
FORCE_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
FORCE_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
FORCE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
FORCE_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
FORCE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FORCE_INLINE Vec max_of(Vec bound, Vec x) { return {_mm256_max_ps(bound.v, x.v)}; }
FORCE_INLINE Vec min_of(Vec bound, Vec x) { return {_mm256_min_ps(bound.v, x.v)}; }
FORCE_INLINE Vec where_less(Vec a, Vec b, Vec x) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ), x.v)};
}
FORCE_INLINE Vec where_at_most(Vec a, Vec b, Vec x) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ), x.v)};
}
FORCE_INLINE Vec round_to_integer(Vec a) { return {_mm256_round_ps(a.v, 0x08)}; }
FORCE_INLINE Vec power_of_two(Vec n) {
  const __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 23))};
}
FORCE_INLINE Vec load_bf16(const char* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
FORCE_INLINE Vec load_f16(const char* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
FORCE_INLINE Vec load_i8(const char* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
FORCE_INLINE void store_bf16(char* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
FORCE_INLINE void store_f16(char* p, Vec a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

#else  // portable: GCC and clang vector extensions, 16 bytes everywhere

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
struct Vec {
  static constexpr int kLanes = 4;
  Float4 v;
};
FORCE_INLINE Vec zero() { return {Float4{0, 0, 0, 0}}; }
FORCE_INLINE Vec broadcast(float x) { return {Float4{x, x, x, x}}; }
FORCE_INLINE Vec load(const float* p) {
  Vec a;
  __builtin_memcpy(&a.v, p, 16);
  return a;
}
FORCE_INLINE void store(float* p, Vec a) { __builtin_memcpy(p, &a.v, 16); }
FORCE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
FORCE_INLINE Vec max_of(Vec bound, Vec x) { return {bound.v > x.v ? bound.v : x.v}; }
FORCE_INLINE Vec min_of(Vec bound, Vec x) { return {bound.v < x.v ? bound.v : x.v}; }
FORCE_INLINE Vec where_less(Vec a, Vec b, Vec x) { return {a.v < b.v ? x.v : Float4{0, 0, 0, 0}}; }
FORCE_INLINE Vec where_at_most(Vec a, Vec b, Vec x) { return {a.v <= b.v ? x.v : Float4{0, 0, 0, 0}}; }
FORCE_INLINE Vec round_to_integer(Vec a) {  // |a| < 2^22 here: adding 1.5 * 2^23 rounds to even
  const Float4 magic = {12582912.f, 12582912.f, 12582912.f, 12582912.f};
  volatile Float4 shifted = a.v + magic;
  return {shifted - magic};
}
FORCE_INLINE Vec power_of_two(Vec n) {
  const Int4 bits = (__builtin_convertvector(n.v, Int4) + 127) << 23;
  return {(Float4)bits};
}
FORCE_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | (magnitude << 13);
  } else {  // scaling by 2^112 turns half's exponent into float's, subnormals included
    bits = magnitude << 13;
    __builtin_memcpy(&value, &bits, 4);
    value *= 5.192296858534828e33f;
    __builtin_memcpy(&bits, &value, 4);
    bits |= sign;
  }
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
FORCE_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds past 65504
  if (magnitude < 0x38800000) {                                 // subnormal: let the adder round
    float shifted;
    __builtin_memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    __builtin_memcpy(&bits, &shifted, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}
FORCE_INLINE uint16_t float_to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
FORCE_INLINE Vec load_bf16(const char* p) {
  uint16_t h[4];
  __builtin_memcpy(h, p, 8);
  return {(Float4)Int4{h[0] << 16, h[1] << 16, h[2] << 16, h[3] << 16}};
}
FORCE_INLINE Vec load_f16(const char* p) {
  uint16_t h[4];
  __builtin_memcpy(h, p, 8);
  return {Float4{half_to_float(h[0]), half_to_float(h[1]), half_to_float(h[2]), half_to_float(h[3])}};
}
FORCE_INLINE Vec load_i8(const char* p) {
  int8_t q[4];
  __builtin_memcpy(q, p, 4);
  return {Float4{float(q[0]), float(q[1]), float(q[2]), float(q[3])}};
}
FORCE_INLINE void store_bf16(char* p, Vec a) {
  const uint16_t h[4] = {float_to_bf16(a.v[0]), float_to_bf16(a.v[1]), float_to_bf16(a.v[2]),
                         float_to_bf16(a.v[3])};
  __builtin_memcpy(p, h, 8);
}
FORCE_INLINE void store_f16(char* p, Vec a) {
  const uint16_t h[4] = {float_to_half(a.v[0]), float_to_half(a.v[1]), float_to_half(a.v[2]),
                         float_to_half(a.v[3])};
  __builtin_memcpy(p, h, 8);
}

#endif

// The vectors of every instruction set are GCC's and clang's own, with operators.
FORCE_INLINE Vec add(Vec a, Vec b) { return {a.v + b.v}; }
FORCE_INLINE Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
FORCE_INLINE Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
FORCE_INLINE Vec div(Vec a, Vec b) { return {a.v / b.v}; }

#if !defined(DYNOPS_ISA_AVX512)  // no masked access: the ragged end goes through a small buffer
template <class T, Vec (*kLoad)(const T*), int kSize = sizeof(T)>
FORCE_INLINE Vec load_part(const T* p, int n) {
  T buffer[Vec::kLanes * kSize / sizeof(T)] = {};
  __builtin_memcpy(buffer, p, n * kSize);
  return kLoad(buffer);
}
template <class T, void (*kStore)(T*, Vec), int kSize = sizeof(T)>
FORCE_INLINE void store_part(T* p, Vec a, int n) {
  T buffer[Vec::kLanes * kSize / sizeof(T)];
  kStore(buffer, a);
  __builtin_memcpy(p, buffer, n * kSize);
}
FORCE_INLINE Vec load(const float* p, int n) { return load_part<float, load>(p, n); }
FORCE_INLINE Vec load_bf16(const char* p, int n) { return load_part<char, load_bf16, 2>(p, n); }
FORCE_INLINE Vec load_f16(const char* p, int n) { return load_part<char, load_f16, 2>(p, n); }
FORCE_INLINE Vec load_i8(const char* p, int n) { return load_part<char, load_i8>(p, n); }
FORCE_INLINE void store(float* p, Vec a, int n) { store_part<float, store>(p, a, n); }
FORCE_INLINE void store_bf16(char* p, Vec a, int n) { store_part<char, store_bf16, 2>(p, a, n); }
FORCE_INLINE void store_f16(char* p, Vec a, int n) { store_part<char, store_f16, 2>(p, a, n); }
#endif

// ----------------------------------------------------------------------------------- shuffles

// low = a0 b0 a1 b1 …, high = what of both is left.
FORCE_INLINE void interleave(Vec a, Vec b, Vec& low, Vec& high) {
#if defined(DYNOPS_ISA_AVX512)
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i last = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  low = {_mm512_permutex2var_ps(a.v, first, b.v)};
  high = {_mm512_permutex2var_ps(a.v, last, b.v)};
#elif defined(DYNOPS_ISA_AVX2)
  const __m256 even = _mm256_unpacklo_ps(a.v, b.v), odd = _mm256_unpackhi_ps(a.v, b.v);
  low = {_mm256_permute2f128_ps(even, odd, 0x20)};
  high = {_mm256_permute2f128_ps(even, odd, 0x31)};
#else
  low = {Float4{a.v[0], b.v[0], a.v[1], b.v[1]}};
  high = {Float4{a.v[2], b.v[2], a.v[3], b.v[3]}};
#endif
}

// Undoes interleave: even = a0 a2 … b0 b2 …, odd = a1 a3 … b1 b3 …
FORCE_INLINE void deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
#if defined(DYNOPS_ISA_AVX512)
  const __m512i first = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  even = {_mm512_permutex2var_ps(a.v, first, b.v)};
  odd = {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(first, _mm512_set1_epi32(1)), b.v)};
#elif defined(DYNOPS_ISA_AVX2)
  even = {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88)), 0xd8))};
  odd = {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0xdd)), 0xd8))};
#else
  even = {Float4{a.v[0], a.v[2], b.v[0], b.v[2]}};
  odd = {Float4{a.v[1], a.v[3], b.v[1], b.v[3]}};
#endif
}

// Row i, lane j of a square becomes row j, lane i: log2(lanes) rounds of perfect shuffles.
FORCE_INLINE void transpose(Vec (&m)[Vec::kLanes]) {
  constexpr int kHalf = Vec::kLanes / 2;
  UNROLL for (int round = 1; round < Vec::kLanes; round *= 2) {
    Vec next[Vec::kLanes];
    UNROLL for (int i = 0; i < kHalf; ++i) interleave(m[i], m[i + kHalf], next[2 * i], next[2 * i + 1]);
    UNROLL for (int i = 0; i < Vec::kLanes; ++i) m[i] = next[i];
  }
}

// ------------------------------------------------------------------ any dtype, full or ragged

FORCE_INLINE Vec load(const char* p, Dtype dtype, int n) {
  if (n >= Vec::kLanes) {
    if (dtype == Dtype::kFloat32) return load((const float*)p);
    return dtype == Dtype::kBFloat16 ? load_bf16(p) : load_f16(p);
  }
  if (dtype == Dtype::kFloat32) return load((const float*)p, n);
  return dtype == Dtype::kBFloat16 ? load_bf16(p, n) : load_f16(p, n);
}

FORCE_INLINE void store(char* p, Vec a, Dtype dtype, int n) {
  if (n >= Vec::kLanes) {
    if (dtype == Dtype::kFloat32) return store((float*)p, a);
    return dtype == Dtype::kBFloat16 ? store_bf16(p, a) : store_f16(p, a);
  }
  if (dtype == Dtype::kFloat32) return store((float*)p, a, n);
  return dtype == Dtype::kBFloat16 ? store_bf16(p, a, n) : store_f16(p, a, n);
}
