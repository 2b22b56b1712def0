// Attention of some queries to a cache of keys and values, which first receives their own. Per query:
//
//   dense:  y = sum over visible p of softmax(K q)[p] V[p]
//   Spark:  s = K1 q[:r],  theta = min(mean(s) + quantile * std(s), max(s)),
//           y = sum over p with s[p] >= theta of softmax(s over those p)[p] softplus(K2[p] . q[r:]) V[p]
//
// with scores soft-capped by cap * tanh(s / cap) in the softmax. Spark attention reads the first r dimensions of all visible keys, but
// only the records of attended ones, where a record is a token's row of K2 followed by its row of V.
//
// Blocking: a task is about 12 queries of one key-value head, the `group` heads that share it times some neighbouring tokens. It
// computes their scores by one product with the keys, then each query's threshold and softmax. Dense attention then adds up V for
// four queries at a time, so that values are converted once; Spark attention adds up V query by query, over attended keys alone.
#pragma once

#include "product.h"
#include "topk.h"

namespace spark::SPARK_SET {
namespace {

// y[i] += sum over p of a[i, p] v[p] for R queries i, y in pair order.
template <int R, class T>
INLINE void weighted_sums(const float* a, size_t a_stride, const T* v, size_t v_stride, int n, float* y, size_t y_stride, int width) {
  int i = 0;
  auto columns = [&](auto count) __attribute__((always_inline)) {
    constexpr int C = decltype(count)::value;
    VecF acc[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) acc[r][c] = load(y + r * y_stride + i + c * W);
    for (int p = 0; p < n; ++p) {
      VecF b[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) b[c] = load_half(v + p * v_stride + i + c / 2 * 2 * W, c % 2);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] += a[r * a_stride + p] * b[c];
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) store(y + r * y_stride + i + c * W, acc[r][c]);
    i += C * W;
  };
  if constexpr (W == 16)
    while (i + 4 * W <= width) columns(std::integral_constant<int, 4>{});
  while (i + 2 * W <= width) columns(std::integral_constant<int, 2>{});
  for (; i < width; ++i)
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < n; ++p) y[r * y_stride + i] += a[r * a_stride + p] * to_float(v[p * v_stride + i]);
}

// Tokens [l0, l1) of one key-value head: n = group * (l1 - l0) queries, head by head, which see positions [begin, end) together.
template <class T>
class QueryBlock {
 public:
  QueryBlock(const Attention<T>& m, int head, int l0, int l1)
      : m(m), head(head), l0(l0), l1(l1), n((l1 - l0) * m.group), width(2 * m.head_dim - m.r), begin(first_visible(m.length + l0)),
        end(m.length + l1), span(end - begin), keys(m.keys + size_t(head) * m.slots * m.r),
        records(m.records + size_t(head) * m.slots * width), q(size_t(n) * m.head_dim), scores(size_t(n) * span),
        y(size_t(n) * m.head_dim), weights(span + W), gate(span), list(span + W) {}

  void run() {
    const int d = m.head_dim, r = m.r;
    for (int i = 0; i < n; ++i) {
      const float* query = m.q + query_index(i) * d;
      to_pair_order<T>(query, r, q + size_t(i) * d);
      to_pair_order<T>(query + r, d - r, q + size_t(i) * d + r);
    }
    std::memset(y, 0, sizeof(float) * n * d);
    contiguous_runs([&](int at, int slot, int length) {
      product(length, n, keys + size_t(slot) * r, r, nullptr, q, d, r, scores + at, span);
    });
    for (int i = 0; i < n; ++i) m.attended[query_index(i)] = m.k ? attend_spark(i) : softmax_dense(i);
    if (!m.k)
      contiguous_runs([&](int at, int slot, int length) {
        groups_of_four(n, [&](auto size, int i) {
          weighted_sums<decltype(size)::value>(scores + size_t(i) * span + at, span, records + size_t(slot) * width + (d - r), width, length,
                                               y + size_t(i) * d, d, d);
        });
      });
    for (int i = 0; i < n; ++i) from_pair_order<T>(y + size_t(i) * d, d, m.y + query_index(i) * d);
  }

 private:
  const Attention<T>& m;
  const int head, l0, l1, n, width, begin, end, span;
  const T *keys, *records;
  Scratch<float> q, scores, y, weights, gate;  // scores: (n, span)
  Scratch<int> list;

  int token(int i) const { return l0 + i % (l1 - l0); }
  size_t query_index(int i) const { return (size_t(head) * m.group + i / (l1 - l0)) * m.tokens + token(i); }

  // A padding token, before the row's first, sees itself alone.
  int first_visible(int position) const {
    return min(position, max(m.first[head / m.heads], m.window ? position - m.window + 1 : 0));
  }

  // f(offset from begin, slot, length) for the runs of positions that are contiguous in the ring buffer: two where it wraps.
  template <class F>
  INLINE void contiguous_runs(F f) const {
    for (int p = begin; p < end;) {
      const int slot = p % m.slots, length = min(end - p, m.slots - slot);
      f(p - begin, slot, length);
      p += length;
    }
  }

  // exp(softcap(s) - softcap(top)) in place, for n scores of which `top` is the largest.
  INLINE void exponentials(float* s, int n, float top) const {
    const float cap = m.cap, high = cap ? cap * std::tanh(top / cap) : top;
    map_in_place(s, n, [&](VecF x) { return exp((cap ? cap * tanh(x / cap) : x) - high); });
  }

  // Turns query i's scores into softmax weights; returns how many keys it attends to.
  int softmax_dense(int i) {
    const int position = m.length + token(i), lo = first_visible(position), visible = position - lo + 1;
    float *row = scores + size_t(i) * span, *s = row + (lo - begin);
    exponentials(s, visible, maximum(s, visible));
    VecF sums = {};
    int j = 0;
    for (; j + W <= visible; j += W) sums += load(s + j);
    float total = horizontal_sum(sums);
    for (; j < visible; ++j) total += s[j];
    for (j = 0; j < visible; ++j) s[j] /= total;
    for (j = 0; j < lo - begin; ++j) row[j] = 0;
    for (j = lo - begin + visible; j < span; ++j) row[j] = 0;
    return visible;
  }

  // Query i's y, in pair order; returns how many keys it attends to.
  int attend_spark(int i) {
    const int d = m.head_dim, r = m.r, position = m.length + token(i), lo = first_visible(position), visible = position - lo + 1;
    const float* s = scores + size_t(i) * span + (lo - begin);
    const float top = maximum(s, visible);
    float theta = -INFINITY;
    if (visible > m.k) {
      const Moments found = moments(s, visible);
      theta = found.mean + found.std * m.quantiles[visible];
      theta = theta < top ? theta : top;
    }
    const int count = compact(s, visible, theta, list, weights);
    exponentials(weights, count, top);
    float total = 0;
    for (int j = 0; j < count; ++j) total += weights[j];
    const int start = lo % m.slots;
    auto attended = [&](int j) {
      const int slot = start + list[min(j, count - 1)];
      return records + size_t(slot < m.slots ? slot : slot - m.slots) * width;
    };
    const float* q2 = q + size_t(i) * d + r;
    groups_of_four(count, [&](auto size, int j) {
      constexpr int R = decltype(size)::value;
      const T* k2[R];
      float out[R][1];
      for (int c = 0; c < R; ++c) {
        k2[c] = attended(j + c);
        const char* ahead = reinterpret_cast<const char*>(attended(j + c + 8));
        for (size_t byte = 0; byte < sizeof(T) * width; byte += CACHE_LINE) prefetch(ahead + byte);
      }
      dots<R, 1>(k2, &q2, d - r, out);
      for (int c = 0; c < R; ++c) gate[j + c] = out[c][0];
    });
    map_in_place(gate, count, [&](VecF x) { return softplus(x); });
    for (int j = 0; j < count; ++j) weights[j] *= gate[j] / total;
    sum_attended(count, [&](int j) { return attended(j) + (d - r); }, y + size_t(i) * d);
    return count;
  }

  // y = sum over j of weights[j] value(j), 8 vectors of columns at a time; y must be 0.
  template <class F>
  INLINE void sum_attended(int count, F value, float* y) const {
    constexpr int C = 8;
    const int d = m.head_dim;
    int column = 0;
    for (; column + C * W <= d; column += C * W) {
      VecF acc[C] = {};
      for (int j = 0; j < count; ++j) {
        const T* v = value(j) + column;
#pragma GCC unroll 8
        for (int c = 0; c < C; c += 2) {
          const Pair pair = load_pair(v + c * W);
          acc[c] += weights[j] * pair.first;
          acc[c + 1] += weights[j] * pair.second;
        }
      }
      for (int c = 0; c < C; ++c) store(y + column + c * W, acc[c]);
    }
    if (column < d)
      for (int j = 0; j < count; ++j) {
        float* tail = y + column;
        axpy<1>(value(j) + column, weights + j, &tail, d - column);
      }
  }
};

template <class T>
void attention(const Attention<T>& m, Pool& pool) {
  const int d = m.head_dim, r = m.r, width = 2 * d - r, L = m.tokens;
  parallel(pool, m.batch * m.heads, [&](int head) {
    for (int l = 0; l < L; ++l) {
      const float* from = m.fresh + (size_t(head) * L + l) * 2 * d;
      const size_t slot = size_t(head) * m.slots + (m.length + l) % m.slots;
      for (int i = 0; i < r; ++i) from_float(from[i], m.keys + slot * r + i);
      for (int i = 0; i < width; ++i) from_float(from[r + i], m.records + slot * width + i);
    }
  }, size_t(m.batch) * m.heads * L * 2 * d);
  const int step = max(1, min(L, 12 / m.group)), blocks = (L + step - 1) / step;
  parallel(pool, m.batch * m.heads * blocks, [&](int task) {
    const int l0 = (blocks - 1 - task % blocks) * step;  // late tokens first: they see the most keys
    QueryBlock<T>(m, task / blocks, l0, min(L, l0 + step)).run();
  });
}

}  // namespace
}  // namespace spark::SPARK_SET
