// Vectors of W = SPARK_WIDTH floats: loads and conversions, horizontal sums, and the functions GELU, exp, tanh and softplus.
//
// The compilers' vector extension lets one source serve every instruction set. Weights are float, bf16, or int8_t with a scale per
// row; all arithmetic is in float32.
//
// Pair order: weights are loaded 2 W at a time, as a pair of vectors. For bf16 the pair holds the even and the odd columns, because
// then a shift or a mask is all that converts them; for other types it holds the first and the second half. Activations that meet
// bf16 weights are permuted to this order once (`to_pair_order`), and results are permuted back (`from_pair_order`). The last
// n % (2 W) columns keep their order.
#pragma once

#include "baseline.h"

namespace spark::SPARK_SET {
namespace {

constexpr int W = SPARK_WIDTH;
typedef float VecF __attribute__((vector_size(4 * W)));
typedef int32_t VecI __attribute__((vector_size(4 * W)));
typedef uint32_t VecU __attribute__((vector_size(4 * W)));
typedef int8_t VecB __attribute__((vector_size(W)));

#define INLINE inline __attribute__((always_inline))

INLINE int min(int a, int b) { return a < b ? a : b; }
INLINE int max(int a, int b) { return a > b ? a : b; }

// Loads and stores

template <class V, class T>
INLINE V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE VecF load(const float* p) { return load_as<VecF>(p); }
INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof v); }

#if SPARK_WIDTH == 16  // by intrinsics: compilers turn __builtin_convertvector into twice the instructions
INLINE VecI widen(const int8_t* p) { return (VecI)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
#elif SPARK_WIDTH == 8
INLINE VecI widen(const int8_t* p) { return (VecI)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
INLINE VecI widen(const int8_t* p) { return __builtin_convertvector(load_as<VecB>(p), VecI); }
#endif
INLINE VecF load(const int8_t* p) { return __builtin_convertvector(widen(p), VecF); }

// Vector h = 0 or 1 of the pair at p.
INLINE VecF load_half(const bf16* p, int h) {
  VecU v = load_as<VecU>(p);
  return (VecF)(h ? v & 0xffff0000u : v << 16);
}
template <class T>
INLINE VecF load_half(const T* p, int h) { return load(p + h * W); }

struct Pair { VecF first, second; };
INLINE Pair load_pair(const bf16* p) {  // both vectors from a single load, for loops that are limited by loads
  VecU v = load_as<VecU>(p);
#if defined(__x86_64__)
  asm("" : "+v"(v));  // without this, compilers load twice
#endif
  return {(VecF)(v << 16), (VecF)(v & 0xffff0000u)};
}
template <class T>
INLINE Pair load_pair(const T* p) { return {load(p), load(p + W)}; }

template <class T>
void to_pair_order(const float* from, int n, float* to) {
  int i = 0;
  if constexpr (std::is_same_v<T, bf16>)
    for (; i + 2 * W <= n; i += 2 * W)
      for (int j = 0; j < W; ++j) {
        to[i + j] = from[i + 2 * j];
        to[i + W + j] = from[i + 2 * j + 1];
      }
  std::memcpy(to + i, from + i, sizeof(float) * (n - i));
}
template <class T>
void from_pair_order(const float* from, int n, float* to) {
  int i = 0;
  if constexpr (std::is_same_v<T, bf16>)
    for (; i + 2 * W <= n; i += 2 * W)
      for (int j = 0; j < W; ++j) {
        to[i + 2 * j] = from[i + j];
        to[i + 2 * j + 1] = from[i + W + j];
      }
  std::memcpy(to + i, from + i, sizeof(float) * (n - i));
}

// Scalar conversions

INLINE float to_float(float x) { return x; }
INLINE float to_float(int8_t x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
INLINE void from_float(float x, float* to) { *to = x; }
INLINE void from_float(float x, bf16* to) {  // rounded to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  to->bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Prefetching

constexpr int CACHE_LINE = 64;
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the second-level cache, which allows more reads in flight

// Elementwise functions

INLINE VecF broadcast(float x) { return x - VecF{}; }
INLINE VecF select(VecI mask, VecF a, VecF b) { return (VecF)((mask & (VecI)a) | (~mask & (VecI)b)); }
INLINE VecF max(VecF a, VecF b) { return select(a > b, a, b); }

// e^x to 2 units in the last place; 0 below -87.
INLINE VecF exp(VecF x) {
  x = max(select(x > broadcast(88), broadcast(88), x), broadcast(-104));
  VecI n = __builtin_convertvector(x * 1.44269504f + select(x > broadcast(0), broadcast(0.5f), broadcast(-0.5f)), VecI);
  VecF m = __builtin_convertvector(n, VecF);
  x = x - m * 0.693359375f + m * 2.12194440e-4f;
  VecF p = ((((x * 1.9875691500e-4f + 1.3981999507e-3f) * x + 8.3334519073e-3f) * x + 4.1665795894e-2f) * x + 1.6666665459e-1f) * x;
  p = (p + 5.0000001201e-1f) * x * x + x + 1.0f;
  return select(n < -126, broadcast(0), p * (VecF)((n + 127) << 23));
}
INLINE VecF tanh(VecF x) {
  VecF t = exp(-2.0f * max(x, -x));
  VecF y = (1.0f - t) / (1.0f + t);
  return select(x < broadcast(0), -y, y);
}
INLINE VecF gelu(VecF x) { return 0.5f * x * (1.0f + tanh(0.7978845608f * x * (1.0f + 0.044715f * x * x))); }
// log(1 + e^x), accurate for tiny results too: log1p(u) = 2 artanh(u / (2 + u)).
INLINE VecF softplus(VecF x) {
  VecF u = exp(-max(x, -x)), s = u / (2.0f + u), z = s * s;
  VecF p = broadcast(1.0f / 17);
  for (int n = 15; n > 0; n -= 2) p = p * z + 1.0f / n;
  return max(broadcast(0), x) + 2.0f * s * p;  // NaN if x is
}

// x[i] = f(x[i]). A lambda f needs a capture default, even if it captures nothing: otherwise the compiler also makes a plain function
// of it, without the instruction set.
template <class F>
INLINE void map_in_place(float* x, int n, F f) {
  int i = 0;
  for (; i + W <= n; i += W) store(x + i, f(load(x + i)));
  if (i < n) {
    float tail[W] = {};
    __builtin_memcpy(tail, x + i, 4 * (n - i));
    store(tail, f(load(tail)));
    __builtin_memcpy(x + i, tail, 4 * (n - i));
  }
}

// Horizontal sums

typedef float Vec4 __attribute__((vector_size(16)));
INLINE Vec4 sum_quads(VecF v) {  // adds up the groups of four lanes
#if SPARK_WIDTH == 16
  auto w = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  auto w = v;
#endif
#if SPARK_WIDTH >= 8
  return __builtin_shufflevector(w, w, 0, 1, 2, 3) + __builtin_shufflevector(w, w, 4, 5, 6, 7);
#else
  return w;
#endif
}
INLINE float horizontal_sum(VecF v) {
  Vec4 x = sum_quads(v);
  return (x[0] + x[2]) + (x[1] + x[3]);
}

// One step of a transposing reduction, within each group of four lanes. Lane i of the result adds lanes j and j + 2 of a or b, where
// j = i / A % 2, and bit i / B % 2 chooses a or b.
template <int A, int B, size_t... I>
INLINE VecF add_halves(VecF a, VecF b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / A % 2 + I % 4 / B % 2 * W)...) +
         __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / A % 2 + I % 4 / B % 2 * W + 2)...);
}
// The horizontal sums of N vectors, four at a time: two steps leave four vectors' sums in each group of four lanes. This takes a third
// of the operations of `horizontal_sum`, and on short rows horizontal sums are most of the work.
template <int N>
INLINE void horizontal_sums(const VecF* v, float* out) {
  constexpr auto lanes = std::make_index_sequence<W>{};
  int i = 0;
#pragma GCC unroll 8
  for (; i + 4 <= N; i += 4) {
    const VecF ab = add_halves<2, 1>(v[i], v[i + 1], lanes), cd = add_halves<2, 1>(v[i + 2], v[i + 3], lanes);
    const Vec4 sums = sum_quads(add_halves<1, 2>(ab, cd, lanes));
    __builtin_memcpy(out + i, &sums, sizeof sums);
  }
#pragma GCC unroll 4
  for (; i < N; ++i) out[i] = horizontal_sum(v[i]);
}

}  // namespace
}  // namespace spark::SPARK_SET
