// Products of a matrix of weights with some tokens, and the sum of an array.
//
//   y[t, o] = scales[o] * (w[o, :] . x[t, :])
//
// Blocking: threads share the rows of w. A thread takes as many rows as fit in the second-level cache (CACHE) past all tokens, a block
// of ROWS x TOKENS dot products at a time, whose sums fill the vector registers: R + C loads serve R C products. A single token takes
// one row at a time instead, because it waits for memory and the processor prefetches a single stream best.
#pragma once

#include "parallel.h"

namespace spark::SPARK_SET {
namespace {

constexpr int ROWS = W == 16 ? 6 : 3, TOKENS = 4, CACHE = 400 << 10;

// out[r][c] = w[r] . x[c], of length n, x in pair order. With Fetch, prefetches `ahead` elements after w.
template <int R, int C, bool Fetch = false, class T>
INLINE void dots(const T* const* w, const float* const* x, int n, float (*out)[C], [[maybe_unused]] ptrdiff_t ahead = 0) {
  constexpr int U = R * C >= 6 ? 1 : R * C >= 3 ? 2 : 4;  // independent sums per product, which hide the latency of additions
  constexpr int S = U > 2 ? U : 2;
  VecF acc[U][R][C] = {};
  auto step = [&](int i, int h, int u) __attribute__((always_inline)) {
    VecF a[R];
    if constexpr (Fetch)
      if (h == 0 || sizeof(T) * W >= CACHE_LINE)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) prefetch(w[r] + i + h * W + ahead);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = load_half(w[r] + i, h);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      VecF b = load(x[c] + i + h * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[u][r][c] += a[r] * b;
    }
  };
  int i = 0;
  if constexpr (C == 1 && U == 2 && !Fetch)  // several rows for one token: limited by loads
    for (; i + 2 * W <= n; i += 2 * W) {
      const VecF first = load(x[0] + i), second = load(x[0] + i + W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Pair a = load_pair(w[r] + i);
        acc[0][r][0] += a.first * first;
        acc[1][r][0] += a.second * second;
      }
    }
  for (; i + S * W <= n; i += S * W)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) step(i + s / 2 * 2 * W, s % 2, s % U);
  for (; i + 2 * W <= n; i += 2 * W)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) step(i, h, 0);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) acc[0][r][c] += acc[u][r][c];
    }
  horizontal_sums<R * C>(&acc[0][0][0], &out[0][0]);
  for (; i < n; ++i)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) out[r][c] += to_float(w[r][i]) * x[c][i];
}

// y[c] += a[c] * v, of length n, y in pair order, for the C tokens that share the row v. With Fetch, prefetches `ahead` elements after v.
template <int C, bool Fetch = false, class T>
INLINE void axpy(const T* v, const float* a, float* const* y, int n, [[maybe_unused]] ptrdiff_t ahead = 0) {
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      if constexpr (Fetch)
        if (h == 0 || sizeof(T) * W >= CACHE_LINE) prefetch(v + i + h * W + ahead);
      VecF b = load_half(v + i, h);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) store(y[c] + i + h * W, load(y[c] + i + h * W) + a[c] * b);
    }
  for (; i < n; ++i)
    for (int c = 0; c < C; ++c) y[c][i] += a[c] * to_float(v[i]);
}

// One block of R rows x C tokens.
template <int R, int C, class T>
INLINE void product_block(const T* w, size_t w_stride, const float* scales, const float* x, size_t x_stride, int n, float* y,
                          size_t y_stride, size_t ahead) {
  const T* rows[R];
  const float* tokens[C];
  for (int r = 0; r < R; ++r) rows[r] = w + r * w_stride;
  for (int c = 0; c < C; ++c) tokens[c] = x + c * x_stride;
  float out[R][C];
  if (ahead)
    dots<R, C, true>(rows, tokens, n, out, ahead);
  else
    dots<R, C>(rows, tokens, n, out);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) y[c * y_stride + r] = scales ? out[r][c] * scales[r] : out[r][c];
}

// All rows against C tokens. `fetch`: the rows are not in the cache yet.
template <int C, class T>
INLINE void product_tokens(int rows, const T* w, size_t w_stride, const float* scales, const float* x, size_t x_stride, int n, float* y,
                           size_t y_stride, bool fetch) {
  // The processor's own prefetching suffices for a single token, except for int8, where it has too few cache lines in flight.
  constexpr int R = C == 1 ? 1 : C == 2 ? 3 : ROWS;
  const size_t ahead = fetch && C == 1 && sizeof(T) == 1 ? 2 * w_stride : 0;
  int o = 0;
  if constexpr (R > 1)
    for (; o + R <= rows; o += R)
      product_block<R, C>(w + o * w_stride, w_stride, scales ? scales + o : scales, x, x_stride, n, y + o, y_stride,
                          fetch ? 6 * w_stride : 0);
  for (; o < rows; ++o)
    product_block<1, C>(w + o * w_stride, w_stride, scales ? scales + o : scales, x, x_stride, n, y + o, y_stride, ahead);
}

// y[t * y_stride + o] for rows o and tokens t, x in pair order. Strides are in elements.
template <class T>
void product(int rows, int tokens, const T* w, size_t w_stride, const float* scales, const float* x, size_t x_stride, int n, float* y,
             size_t y_stride) {
  // A few tokens fit in the first-level cache: then rows need not be read again, and are not split.
  const int split = tokens <= TOKENS ? rows : max(ROWS, int(CACHE / (sizeof(T) * n)) / ROWS * ROWS);
  for (int o = 0; o < rows; o += split) {
    const int part = min(split, rows - o);
    auto go = [&](auto size, int t) {
      product_tokens<decltype(size)::value>(part, w + o * w_stride, w_stride, scales ? scales + o : scales, x + t * x_stride, x_stride, n,
                                            y + t * y_stride + o, y_stride, t == 0);
    };
    int t = 0;
    for (; t + TOKENS <= tokens; t += TOKENS) go(std::integral_constant<int, TOKENS>{}, t);
    if constexpr (TOKENS > 2)
      for (; t + 2 <= tokens; t += 2) go(std::integral_constant<int, 2>{}, t);
    for (; t < tokens; ++t) go(std::integral_constant<int, 1>{}, t);
  }
}

template <class T>
void matmul(const Matmul<T>& m, Pool& pool) {
  Scratch<float> x(size_t(m.tokens) * m.in);
  parallel(pool, m.tokens, [&](int t) { to_pair_order<T>(m.x + size_t(t) * m.in, m.in, x + size_t(t) * m.in); }, size_t(m.tokens) * m.in);
  parallel_ranges(pool, m.out, 16, [&](int lo, int hi) {
    product(hi - lo, m.tokens, m.w.values + size_t(lo) * m.in, m.in, m.w.scales ? m.w.scales + lo : nullptr, x, m.in, m.in, m.y + lo, m.out);
  });
}

// The sum of an array, in pieces of which each task adds up one.
void read(const Read& m, Pool& pool) {
  const int64_t piece = 1 << 16, pieces = (m.n + piece - 1) / piece;
  Scratch<float> sums(pieces);
  parallel(pool, int(pieces), [&](int i) {
    const float* x = m.x + i * piece;
    const int n = int(m.n - i * piece < piece ? m.n - i * piece : piece);
    VecF acc[8] = {};
    int j = 0;
    for (; j + 8 * W <= n; j += 8 * W)
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) acc[c] += load(x + j + c * W);
    float total = 0;
    for (int c = 0; c < 8; ++c) total += horizontal_sum(acc[c]);
    for (; j < n; ++j) total += x[j];
    sums[i] = total;
  });
  *m.y = 0;
  for (int64_t i = 0; i < pieces; ++i) *m.y += sums[i];
}

}  // namespace
}  // namespace spark::SPARK_SET
