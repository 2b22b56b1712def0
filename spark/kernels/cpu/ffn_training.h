// The Spark FFN and its gradients, for training. Scores s (tokens, d_ff) are given, and each token's threshold is theta:
//
//   m = s - theta where s > theta,   a = GELU(m),   s2 = x2 . K2,   y = sum over active neurons of a s2 V
//
// and backward, with u = dy . V, at the active neurons only:
//
//   dm = u s2 GELU'(m),   ds2 = u a,   dV = (a s2)^T dy,   dK2 = ds2^T x2,   dx2 = ds2 K2,   dK1 = dm^T x1,   dx1 = dm K1
//
// The gradient of theta is -sum dm per token, and makes that of the scores ds = dm + alpha + beta s. What this adds to K1 and x1 is dense,
// but has rank r: the caller adds it by ordinary products, or has all of ds and takes products with that instead.
#pragma once

#include "sparse.h"

namespace spark::SPARK_SET {
namespace {

// The active neurons of all tokens.
class Active {
 public:
  const Pattern pattern;
  const int size;  // room for the entries
  const Scratch<int> columns;
  const Scratch<float> m;  // s - theta

  Active(Pool& pool, const float* scores, const float* thetas, int tokens, int d_ff)
      : pattern(tokens, d_ff), size(count(pool, scores, thetas)), columns(size), m(size) {
    parallel(pool, pattern.blocks, [&](int b) {
      const int* start = pattern.starts(b);
      for (int t = 0; t < tokens; ++t) {
        const int n = compact(of(scores, t, b), pattern.width(b), next_above(comparable(thetas[t])), columns + start[t], m + start[t]);
        for (int p = start[t]; p < start[t] + n; ++p) m[p] -= thetas[t];
      }
    });
  }

  // f(entry) for every W-th entry; the entries of a block have room for a vector after them.
  template <class F>
  void parallel_vectors(Pool& pool, F f) const {
    parallel(pool, pattern.blocks, [&](int b) {
      for (int p = pattern.starts(b)[0], end = pattern.starts(b)[pattern.rows]; p < end; p += W) f(p);
    });
  }

 private:
  // Some threads take denormal numbers for zero, and others do not, but all must find the same neurons above a threshold.
  static float comparable(float theta) { return std::abs(theta) <= FLT_MIN ? FLT_MIN : theta; }
  static float next_above(float theta) { return std::nextafter(theta, INFINITY); }  // s >= this is s > theta
  const float* of(const float* scores, int t, int b) const { return scores + size_t(t) * pattern.columns + b * BLOCK_COLUMNS; }

  int count(Pool& pool, const float* scores, const float* thetas) const {
    parallel(pool, pattern.blocks, [&](int b) {
      for (int t = 0; t < pattern.rows; ++t) {
        const float *s = of(scores, t, b), theta = comparable(thetas[t]);
        int n = 0;
        for (int f = 0; f < pattern.width(b); ++f) n += s[f] > theta;
        pattern.starts(b)[t + 1] = n;
      }
    });
    return pattern.sum_counts();
  }
};

// The smoothed soft threshold of m > 0, and its slope.
INLINE VecF smoothed(VecF m, float huber) {
  return huber > 0 ? select(m < broadcast(huber), m * m * (0.5f / huber), m - 0.5f * huber) : m;
}
INLINE VecF smoothed_slope(VecF m, float huber) {
  return huber > 0 ? select(m < broadcast(huber), m * (1 / huber), broadcast(1)) : broadcast(1);
}
INLINE VecF gelu_slope(VecF x) {
  const VecF t = tanh(0.7978845608f * x * (1.0f + 0.044715f * x * x));
  return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * (0.7978845608f * (1.0f + 0.134145f * x * x));
}

// The second scores of the active neurons.
void second_scores(Pool& pool, const Active& active, Table x2, Table k2, float* s2) {
  if (x2.width)
    sampled(pool, active.pattern, active.columns, x2, k2, s2);
  else
    for (int p = 0; p < active.size; ++p) s2[p] = 1;
}

void ffn_training(const FFNForward& m, Pool& pool) {
  const int T = m.tokens, F = m.d_ff;
  Scratch<float> thetas(T);
  parallel(pool, T, [&](int t) {
    const Moments found = moments(m.scores + size_t(t) * F, F, m.ddof);
    thetas[t] = found.mean + found.std * m.quantile;
    float* statistics = m.statistics + size_t(t) * 3;
    statistics[0] = thetas[t];
    statistics[1] = found.mean;
    statistics[2] = found.std;
  }, size_t(T) * F);
  const Active active(pool, m.scores, thetas, T, F);
  for (int t = 0; t < T; ++t) {
    m.active[t] = 0;
    for (int b = 0; b < active.pattern.blocks; ++b) m.active[t] += active.pattern.starts(b)[t + 1] - active.pattern.starts(b)[t];
  }
  Scratch<float> k2(size_t(F) * m.width), s2(active.size);
  transpose(pool, m.width, F, m.k2, k2);
  second_scores(pool, active, {m.x2, m.width}, {k2, m.width}, s2);
  active.parallel_vectors(pool, [&](int p) { store(s2 + p, gelu(smoothed(load(active.m + p), m.huber)) * load(s2 + p)); });
  weighted(pool, active.pattern, active.columns, s2, {m.v, m.d_model}, m.y);
  for (int t = 0; t < T; ++t)  // scores that are not numbers have no active neurons: a run that diverged must not look sound
    if (std::isnan(thetas[t]))
      for (int i = 0; i < m.d_model; ++i) m.y[size_t(t) * m.d_model + i] = NAN;
}

void ffn_training(const FFNBackward& m, Pool& pool) {
  const int T = m.tokens, F = m.d_ff;
  Scratch<float> thetas(T);
  for (int t = 0; t < T; ++t) thetas[t] = m.statistics[size_t(t) * 3];
  const Active active(pool, m.scores, thetas, T, F);
  const Pattern& pattern = active.pattern;
  const int* columns = active.columns;
  // In place: s2 becomes ds2, u becomes dm, and m becomes the weight of V.
  Scratch<float> ds2(active.size), dm(active.size), k2(size_t(F) * m.width), dk2(size_t(F) * m.width);
  float* weight = active.m;
  transpose(pool, m.width, F, m.k2, k2);
  second_scores(pool, active, {m.x2, m.width}, {k2, m.width}, ds2);
  sampled(pool, pattern, columns, {m.dy, m.d_model}, {m.v, m.d_model}, dm);
  active.parallel_vectors(pool, [&](int p) {
    const VecF above = load(weight + p), x = smoothed(above, m.huber), a = gelu(x), s2 = load(ds2 + p), u = load(dm + p);
    store(weight + p, a * s2);
    store(ds2 + p, u * a);
    store(dm + p, u * s2 * gelu_slope(x) * smoothed_slope(above, m.huber));
  });
  parallel(pool, T, [&](int t) {
    float dtheta = 0;
    for (int b = 0; b < pattern.blocks; ++b)
      for (int p = pattern.starts(b)[t]; p < pattern.starts(b)[t + 1]; ++p) dtheta -= dm[p];
    const float mean = m.statistics[size_t(t) * 3 + 1], std = m.statistics[size_t(t) * 3 + 2];
    const bool spread = std > 1e-6f * std::abs(mean);  // of equal scores it is but rounding
    const float beta = spread ? dtheta * m.quantile / (max(F - m.ddof, 1) * std) : 0, alpha = dtheta / F - beta * mean;
    m.slopes[size_t(t) * 2] = alpha;
    m.slopes[size_t(t) * 2 + 1] = beta;
    if (!m.ds) return;
    float* ds = m.ds + size_t(t) * F;
    for (int f = 0; f < F; ++f) ds[f] = alpha + beta * ds[f];
    for (int b = 0; b < pattern.blocks; ++b)
      for (int p = pattern.starts(b)[t]; p < pattern.starts(b)[t + 1]; ++p) ds[b * BLOCK_COLUMNS + columns[p]] += dm[p];
  });
  weighted(pool, pattern, columns, ds2, {k2, m.width}, m.dx2);
  const Transposed transposed(pool, pattern, columns);
  transposed.weighted(pool, weight, {m.dy, m.d_model}, m.dv);
  transposed.weighted(pool, ds2, {m.x2, m.width}, dk2);
  transpose(pool, F, m.width, dk2, m.dk2);
  if (m.ds) return;
  Scratch<float> k1(size_t(F) * m.r);
  transpose(pool, m.r, F, m.k1, k1);
  weighted(pool, pattern, columns, dm, {k1, m.r}, m.dx1);
  transposed.weighted(pool, dm, {m.x1, m.r}, m.dk1);
}

}  // namespace
}  // namespace spark::SPARK_SET
