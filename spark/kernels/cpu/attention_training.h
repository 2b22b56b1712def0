// Spark attention and its gradients, for training. Query i sees the keys start_i ... i. With s = q1 . k1 over the first r dimensions of a
// head, s2 = q2 . k2 over the others, and theta = min(mean(s) + quantile * std(s), max(s)) over the keys that it sees:
//
//   p = softmax(cap(s)) over the keys with s >= theta,   y = sum of p softplus(s2) v
//
// and backward, with u = dy . v and delta = dy . y, for those keys only, since theta has no gradient:
//
//   dcap(s) = p (softplus(s2) u - delta),   ds2 = p u sigmoid(s2),   dv += p softplus(s2) dy
//
// Blocking: the queries of a key-value head are taken by chunks of neighbouring tokens. Every query is scored with all keys that it sees,
// a few queries at a time, whose scores stay in the second-level cache; what survives goes into a sparse matrix of queries and keys. All
// else is products with that matrix (sparse.h). Backward scores again, which costs less than to keep the survivors.
#pragma once

#include "sparse.h"

namespace spark::SPARK_SET {
namespace {

constexpr int PANEL = (W == 16 ? 4 : 2) * W, QUERIES = 6;  // keys and queries of a block of scores, whose sums fill the registers
constexpr int GROUP_SCORES = 1 << 18;                      // scores that stay in the second-level cache
constexpr int CHUNK_SCORES = 1 << 22, CHUNK_QUERIES = 1 << 11;

struct Serial final : Pool {
  int threads() const override { return 1; }
  void run(int n, void (*task)(void*, int), void* context) override {
    for (int i = 0; i < n; ++i) task(context, i);
  }
};

// The first r dimensions of the keys by panels, (r, PANEL) each; the last is filled up with zeros.
void pack_keys(Pool& pool, const float* keys, int n, int stride, int r, float* packed) {
  parallel(pool, (n + PANEL - 1) / PANEL, [&](int panel) {
    float* to = packed + size_t(panel) * r * PANEL;
    for (int j = 0; j < PANEL; ++j) {
      const int key = panel * PANEL + j;
      for (int i = 0; i < r; ++i) to[i * PANEL + j] = key < n ? keys[size_t(key) * stride + i] : 0;
    }
  });
}

// scores[i, j] = queries[i] . panel[:, j] for QUERIES queries and a panel of keys
INLINE void score_block(const float* queries, size_t stride, const float* panel, int r, float* scores, size_t scores_stride) {
  constexpr int C = PANEL / W;
  VecF sums[QUERIES][C] = {};
  for (int i = 0; i < r; ++i) {
    VecF keys[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) keys[c] = load(panel + i * PANEL + c * W);
#pragma GCC unroll 6
    for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[q][c] += queries[q * stride + i] * keys[c];
  }
#pragma GCC unroll 6
  for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(scores + q * scores_stride + c * W, sums[q][c]);
}

// The queries of tokens [l0, l1) of one key-value head, token by token, the `group` heads of a token together; and the keys that they
// see, from `begin` on.
struct Chunk {
  const AttentionInputs& m;
  const int head, l0, l1, rows, begin, span;

  Chunk(const AttentionInputs& m, int head, int l0, int l1)
      : m(m), head(head), l0(l0), l1(l1), rows((l1 - l0) * m.group), begin(starts_of(m, head)[l0]), span(l1 - begin) {}

  static const int32_t* starts_of(const AttentionInputs& m, int head) { return m.starts + size_t(head / m.heads) * m.length; }
  int token(int row) const { return l0 + row / m.group; }
  int first(int row) const { return starts_of(m, head)[token(row)] - begin; }  // its first key, counted from `begin`
  int end(int row) const { return token(row) + 1 - begin; }
  size_t query(int row) const { return (size_t(head) * m.group + row % m.group) * m.length + token(row); }

  // x (batch, heads, group, length, head_dim) to rows, filled up with zeros to whole blocks
  int padded() const { return (rows + QUERIES - 1) / QUERIES * QUERIES; }
  void gather(Pool& pool, const float* x, float* to) const {
    const int d = m.head_dim;
    parallel(pool, rows, [&](int row) { std::memcpy(to + size_t(row) * d, x + query(row) * d, sizeof(float) * d); }, size_t(rows) * d);
    std::memset(to + size_t(rows) * d, 0, sizeof(float) * (padded() - rows) * d);
  }
};

// f(pool, head) for each key-value head; the threads share the heads, or the work within one.
template <class F>
void over_heads(Pool& pool, const AttentionInputs& m, F f) {
  const int heads = m.batch * m.heads, threads = pool.threads();
  if (heads % threads == 0 || heads >= 4 * threads)
    parallel(pool, heads, [&](int head) {
      Serial serial;
      f(serial, head);
    });
  else
    for (int head = 0; head < heads; ++head) f(pool, head);
}

// f(chunk) for the chunks of a head, in order. Their sizes depend on what the queries see, and not on the threads.
template <class F>
void over_chunks(const AttentionInputs& m, int head, F f) {
  const int32_t* starts = Chunk::starts_of(m, head);
  int longest = 1;
  for (int l = 0; l < m.length; ++l) longest = max(longest, l + 1 - starts[l]);
  const int tokens = max(1, min(CHUNK_QUERIES, max(64, CHUNK_SCORES / longest)) / m.group);
  for (int l = 0; l < m.length; l += tokens) f(Chunk(m, head, l, min(m.length, l + tokens)));
}

// The queries and keys of a chunk with s >= theta, and these scores.
class Survivors {
 public:
  const Pattern pattern;

 private:
  const int room_;
  const Scratch<int> found_columns_;  // (rows, room_), row by row
  const Scratch<float> found_scores_;

 public:
  const int size;
  const Scratch<int> columns;
  const Scratch<float> scores;

  // theta(row, scores of the keys that it sees, their number) is called once for each row.
  template <class F>
  Survivors(Pool& pool, const Chunk& chunk, const float* queries, const float* packed, F theta)
      : pattern(chunk.rows, chunk.span), room_(chunk.span + W), found_columns_(size_t(chunk.rows) * room_),
        found_scores_(size_t(chunk.rows) * room_), size(find(pool, chunk, queries, packed, theta)), columns(size), scores(size) {
    parallel(pool, chunk.rows, [&](int t) {
      size_t from = size_t(t) * room_;
      for (int b = 0; b < pattern.blocks; ++b) {
        const int start = pattern.starts(b)[t], n = pattern.starts(b)[t + 1] - start;
        std::memcpy(columns + start, found_columns_ + from, sizeof(int) * n);
        std::memcpy(scores + start, found_scores_ + from, sizeof(float) * n);
        from += n;
      }
    });
  }

  int count(int row) const {
    int n = 0;
    for (int b = 0; b < pattern.blocks; ++b) n += pattern.starts(b)[row + 1] - pattern.starts(b)[row];
    return n;
  }

  // f(block, row, entry, how many of the W entries from there are the row's), entry by W-th entry of each row of a block.
  template <class F>
  void parallel_rows(Pool& pool, F f) const {
    parallel(pool, pattern.blocks, [&](int b) {
      const int* start = pattern.starts(b);
      for (int t = 0; t < pattern.rows; ++t)
        for (int p = start[t]; p < start[t + 1]; p += W) f(b, t, p, start[t + 1] - p);
    });
  }

 private:
  template <class F>
  int find(Pool& pool, const Chunk& chunk, const float* queries, const float* packed, F theta) const {
    const int d = chunk.m.head_dim, r = chunk.m.r;
    const int step = max(2, min(16, GROUP_SCORES / chunk.span / QUERIES)) * QUERIES;
    parallel(pool, (chunk.rows + step - 1) / step, [&](int group) {
      const int t0 = group * step, t1 = min(chunk.rows, t0 + step), blocks = (t1 - t0 + QUERIES - 1) / QUERIES;
      const int first_panel = (chunk.begin + chunk.first(t0)) / PANEL, panels = (chunk.token(t1 - 1) / PANEL) + 1 - first_panel;
      const int stride = panels * PANEL, shift = chunk.begin - first_panel * PANEL;  // key `begin` is in column `shift`
      Scratch<float> s(size_t(blocks) * QUERIES * stride);
      for (int panel = 0; panel < panels; ++panel)
        for (int i = 0; i < blocks; ++i)
          score_block(queries + size_t(t0 + i * QUERIES) * d, d, packed + size_t(first_panel + panel) * r * PANEL, r,
                      s + size_t(i) * QUERIES * stride + panel * PANEL, stride);
      for (int t = t0; t < t1; ++t) {
        const float* row = s + size_t(t - t0) * stride + shift;
        const int lo = chunk.first(t), hi = chunk.end(t);
        keep(t, row, lo, hi, theta(t, row + lo, hi - lo));
      }
    });
    return pattern.sum_counts();
  }

  void keep(int t, const float* s, int lo, int hi, float theta) const {
    size_t next = size_t(t) * room_;
    for (int b = 0; b < pattern.blocks; ++b) {
      const int first = b * BLOCK_COLUMNS, from = max(lo, first), n = min(hi, first + BLOCK_COLUMNS) - from;
      int* list = found_columns_ + next;
      const int count = n > 0 ? compact(s + from, n, theta, list, found_scores_ + next) : 0;
      if (from > first)
        for (int i = 0; i < count; ++i) list[i] += from - first;
      pattern.starts(b)[t + 1] = count;
      next += count;
    }
  }
};

INLINE void store_first(int n, float* p, VecF v) {  // the first n lanes only
  VecI lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  store(p, n < W ? select(lane < n, v, load(p)) : v);
}
INLINE VecF softcap(VecF s, float cap) { return cap ? cap * tanh(s / cap) : s; }
INLINE VecF sigmoid(VecF x) { return 1.0f / (1.0f + exp(-x)); }

void look_up(Pool& pool, const AttentionForward& f, const Chunk& chunk, const float* packed) {
  const AttentionInputs& m = f.in;
  const int d = m.head_dim, r = m.r;
  const float *k = m.k + size_t(chunk.head) * m.length * d, *v = m.v + size_t(chunk.head) * m.length * d, *keys = k + size_t(chunk.begin) * d;
  Scratch<float> q(size_t(chunk.padded()) * d), logit(chunk.rows);
  chunk.gather(pool, m.q, q);
  const Survivors found(pool, chunk, q, packed, [&](int t, const float* s, int n) {
    const float top = maximum(s, n);
    const Moments stats = moments(s, n);
    float theta = -INFINITY;
    if (n > f.keep) theta = stats.mean + stats.std * f.quantiles[n];
    theta = theta > top ? top : theta;
    logit[t] = std::isfinite(stats.mean) ? softcap(broadcast(top), m.cap)[0] : NAN;  // NaN, which no comparison lets survive, shows in y
    return f.thetas[chunk.query(t)] = theta;
  });
  const Pattern& pattern = found.pattern;
  Scratch<float> totals(size_t(pattern.blocks) * chunk.rows), s2(found.size), y(size_t(chunk.rows) * d);
  std::memset(totals, 0, sizeof(float) * pattern.blocks * chunk.rows);
  sampled(pool, pattern, found.columns, {q + r, d - r, d}, {keys + r, d - r, d}, s2);
  found.parallel_rows(pool, [&](int b, int t, int p, int n) {
    float e[W] = {};
    store_first(n, e, exp(softcap(load(found.scores + p), m.cap) - logit[t]));
    totals[size_t(b) * chunk.rows + t] += horizontal_sum(load(e));
    store_first(n, s2 + p, load(e) * softplus(load(s2 + p)));
  });
  weighted(pool, pattern, found.columns, s2, {v + size_t(chunk.begin) * d, d}, y);
  parallel(pool, chunk.rows, [&](int t) {
    float total = 0 * logit[t];
    for (int b = 0; b < pattern.blocks; ++b) total += totals[size_t(b) * chunk.rows + t];
    const size_t query = chunk.query(t);
    f.log_z[query] = logit[t] + std::log(total);
    f.attended[query] = found.count(t);
    for (int i = 0; i < d; ++i) f.y[query * d + i] = y[size_t(t) * d + i] / total;
  }, size_t(chunk.rows) * d);
}

void gradients(Pool& pool, const AttentionBackward& g, const Chunk& chunk, const float* packed) {
  const AttentionInputs& m = g.in;
  const int d = m.head_dim, r = m.r;
  const size_t first = (size_t(chunk.head) * m.length + chunk.begin) * d;
  const float *keys = m.k + first, *values = m.v + first;
  Scratch<float> q(size_t(chunk.padded()) * d), dy(size_t(chunk.padded()) * d), dq(size_t(chunk.rows) * d), delta(chunk.rows);
  chunk.gather(pool, m.q, q);
  chunk.gather(pool, g.dy, dy);
  parallel(pool, chunk.rows, [&](int t) {
    const float *a = dy + size_t(t) * d, *b = g.y + chunk.query(t) * d;
    float out[1][1];
    dots<1, 1>(&a, &b, d, out);
    delta[t] = out[0][0];
  }, size_t(chunk.rows) * d);
  const Survivors found(pool, chunk, q, packed, [&](int t, const float*, int) { return g.thetas[chunk.query(t)]; });
  const Pattern& pattern = found.pattern;
  const int* columns = found.columns;
  // In place: the scores become ds, s2 becomes ds2, and u the weight of v.
  Scratch<float> s2(found.size), u(found.size);
  float* s = found.scores;
  sampled(pool, pattern, columns, {q + r, d - r, d}, {keys + r, d - r, d}, s2);
  sampled(pool, pattern, columns, {dy, d}, {values, d}, u);
  found.parallel_rows(pool, [&](int, int t, int i, int n) {
    const VecF logit = softcap(load(s + i), m.cap), p = exp(logit - g.log_z[chunk.query(t)]), second = load(s2 + i), dot = load(u + i);
    const VecF gate = softplus(second), slope = m.cap ? 1.0f - logit * logit * (1 / (m.cap * m.cap)) : broadcast(1);
    store_first(n, u + i, p * gate);
    store_first(n, s + i, p * (gate * dot - delta[t]) * slope);
    store_first(n, s2 + i, p * dot * sigmoid(second));
  });
  weighted(pool, pattern, columns, s, {keys, r, d}, dq, d);
  weighted(pool, pattern, columns, s2, {keys + r, d - r, d}, dq + r, d);
  parallel(pool, chunk.rows, [&](int t) { std::memcpy(g.dq + chunk.query(t) * d, dq + size_t(t) * d, sizeof(float) * d); },
           size_t(chunk.rows) * d);
  const Transposed transposed(pool, pattern, columns);
  transposed.weighted(pool, u, {dy, d}, g.dv + first, d, true);
  transposed.weighted(pool, s, {q, r, d}, g.dk + first, d, true);
  transposed.weighted(pool, s2, {q + r, d - r, d}, g.dk + first + r, d, true);
}

template <class M, class F>
void attention_training(const M& m, Pool& pool, F f) {
  const int L = m.in.length, d = m.in.head_dim, r = m.in.r;
  over_heads(pool, m.in, [&](Pool& threads, int head) {
    Scratch<float> packed(size_t((L + PANEL - 1) / PANEL) * PANEL * r);
    pack_keys(threads, m.in.k + size_t(head) * L * d, L, d, r, packed);
    over_chunks(m.in, head, [&](const Chunk& chunk) { f(threads, m, chunk, packed); });
  });
}
void attention_training(const AttentionForward& m, Pool& pool) {
  attention_training(m, pool, [&](Pool& threads, const AttentionForward& m, const Chunk& chunk, const float* packed) {
    look_up(threads, m, chunk, packed);
  });
}
void attention_training(const AttentionBackward& m, Pool& pool) {
  const size_t size = size_t(m.in.batch) * m.in.heads * m.in.length * m.in.head_dim;
  std::memset(m.dk, 0, sizeof(float) * size);
  std::memset(m.dv, 0, sizeof(float) * size);
  attention_training(m, pool, [&](Pool& threads, const AttentionBackward& m, const Chunk& chunk, const float* packed) {
    gradients(threads, m, chunk, packed);
  });
}

}  // namespace
}  // namespace spark::SPARK_SET
