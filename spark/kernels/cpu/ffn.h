// The Spark FFN:
//
//   s = K1 x[:r],  theta = mean(s) + quantile * std(s),  y = sum over f with s[f] > theta of GELU(s[f] - theta) (K2[f] . x[r:]) V[f]
//
// It reads all of K1, but only the records of active neurons, where a record is a neuron's row of K2 followed by its row of V.
//
// Blocking: scores and thresholds of all tokens come first (`Scores`). Then
// - up to DECODE_TOKENS tokens go record by record (`ffn_decode`): each record is one contiguous read, used by every token for which
//   its neuron is active, while the record after the next is prefetched. Threads share the neurons.
// - more tokens go by blocks of neurons whose records fit in the second-level cache (`Prefill`), first the dot products with K2, then
//   the sums of V, while the next block is prefetched. Threads share the blocks, then the columns of y.
// Prompts go by chunks of 64 tokens. The order of every sum depends on the shapes and the number of threads only.
#pragma once

#include "product.h"
#include "topk.h"

namespace spark::SPARK_SET {
namespace {

// Scores (tokens, d_ff) of all neurons, each token's threshold, and the tokens in pair order.
template <class T>
struct Scores {
  const FFN<T>& m;
  Scratch<float> x, scores, thresholds;

  Scores(const FFN<T>& m, Pool& pool)
      : m(m), x(size_t(m.tokens) * m.d_model), scores(size_t(m.tokens) * m.d_ff), thresholds(m.tokens) {
    const int D = m.d_model, F = m.d_ff, r = m.r;
    parallel(pool, m.tokens, [&](int t) {
      to_pair_order<T>(m.x + size_t(t) * D, r, x + size_t(t) * D);
      to_pair_order<T>(m.x + size_t(t) * D + r, D - r, x + size_t(t) * D + r);
    }, size_t(m.tokens) * D);
    parallel_ranges(pool, F, 64, [&](int lo, int hi) {
      product(hi - lo, m.tokens, m.k1.values + size_t(lo) * r, r, m.k1.scales ? m.k1.scales + lo : nullptr, x, D, r, scores + lo, F);
    });
    parallel(pool, m.tokens, [&](int t) {
      const float* s = of(t);
      int n = F;
      thresholds[t] = m.quantile;
      if (m.quantile != -INFINITY) {
        Moments found = moments(s, F);
        thresholds[t] = found.mean + found.std * m.quantile;
        n = 0;
        for (int f = 0; f < F; ++f) n += s[f] > thresholds[t];
      }
      m.active[t] = n;
    });
  }

  const float* of(int t) const { return scores + size_t(t) * m.d_ff; }

  // s = GELU(s - theta) for n scores of token t; with `huber`, the soft threshold s - theta is smoothed.
  void activate(int t, float* s, int n) const {
    if (m.quantile != -INFINITY)
      for (int i = 0; i < n; ++i) {
        s[i] -= thresholds[t];
        if (m.huber > 0) s[i] = s[i] < m.huber ? s[i] * s[i] / (2 * m.huber) : s[i] - m.huber / 2;
      }
    map_in_place(s, n, [&](VecF x) { return gelu(x); });
  }
};

template <class T>
INLINE const T* record(const FFN<T>& m, size_t f) { return m.records.values + f * (2 * m.d_model - m.r); }
template <class T>
INLINE float record_scale(const FFN<T>& m, size_t f) {  // of the product of a K2 row and a V row
  return m.records.scales ? m.records.scales[2 * f] * m.records.scales[2 * f + 1] : 1.0f;
}

constexpr int DECODE_TOKENS = 4;

// The neurons of [lo, lo + size) that are active for any of a few tokens.
template <class T>
struct ActiveNeurons {
  int n = 0;                // how many there are
  Scratch<uint8_t> active;  // (size) bit t of a neuron: it is active for token t
  Scratch<int> list;        // (n) the neurons, counted from lo
  Scratch<float> weights;   // (tokens, size) the activations of the listed neurons, n per token

  ActiveNeurons(const Scores<T>& scores, int lo, int size) : active(size), list(size + 1), weights(size_t(scores.m.tokens) * size) {
    std::memset(active, 0, size);
    for (int t = 0; t < scores.m.tokens; ++t) {
      const float *s = scores.of(t) + lo, theta = scores.thresholds[t];
      for (int f = 0; f < size; ++f) active[f] |= (s[f] > theta) << t;
    }
    for (int f = 0; f < size; ++f) {
      list[n] = f;
      n += active[f] != 0;
    }
    for (int t = 0; t < scores.m.tokens; ++t) {
      for (int j = 0; j < n; ++j) weights[t * size + j] = scores.of(t)[lo + list[j]];
      scores.activate(t, weights + t * size, n);
    }
  }
};

template <class T>
void ffn_decode(const FFN<T>& m, Pool& pool) {
  const int D = m.d_model, F = m.d_ff, r = m.r, rest = D - r, tokens = m.tokens;
  const Scores<T> scores(m, pool);
  // Each piece of the neurons has its own sums, which are added up at the end, so the order does not depend on the threads' timing.
  const int pieces = min(F, pool.threads() * 4);
  Scratch<float> sums(size_t(pieces) * tokens * D);
  Scratch<int> read(pieces);
  parallel(pool, pieces, [&](int piece) {
    const int lo = int64_t(F) * piece / pieces, hi = int64_t(F) * (piece + 1) / pieces, size = hi - lo;
    float* y = sums + size_t(piece) * tokens * D;
    std::memset(y, 0, sizeof(float) * tokens * D);
    const ActiveNeurons<T> found(scores, lo, size);
    const int n = found.n, *list = found.list;
    read[piece] = n;
    auto listed = [&](int j) { return record(m, lo + list[min(j, n - 1)]); };
    for (int j = 0; j < n; ++j) {
      const T* k2 = listed(j);
      const ptrdiff_t ahead = listed(j + 2) - k2;
      const float scale = record_scale(m, lo + list[j]);
      int token[DECODE_TOKENS], sharing = 0;
      for (unsigned bits = found.active[list[j]]; bits; bits &= bits - 1) token[sharing++] = __builtin_ctz(bits);
      auto add_record = [&](auto count) {
        constexpr int C = decltype(count)::value;
        const float* q2[C];
        float *to[C], out[1][C];
        for (int c = 0; c < C; ++c) {
          q2[c] = scores.x + size_t(token[c]) * D + r;
          to[c] = y + size_t(token[c]) * D;
        }
        dots<1, C, true>(&k2, q2, rest, out, ahead);
        for (int c = 0; c < C; ++c) out[0][c] *= found.weights[token[c] * size + j] * scale;
        axpy<C, true>(k2 + rest, out[0], to, D, ahead);
      };
      if (sharing == 1) add_record(std::integral_constant<int, 1>{});
      if (sharing == 2) add_record(std::integral_constant<int, 2>{});
      if (sharing == 3) add_record(std::integral_constant<int, 3>{});
      if (sharing == 4) add_record(std::integral_constant<int, 4>{});
    }
  });
  for (int piece = 0; piece < pieces; ++piece) *m.read += read[piece];
  parallel(pool, tokens, [&](int t) {
    float* y = sums + size_t(t) * D;
    for (int piece = 1; piece < pieces; ++piece) {
      const float* from = sums + (size_t(piece) * tokens + t) * D;
      for (int i = 0; i < D; ++i) y[i] += from[i];
    }
    from_pair_order<T>(y, D, m.y + size_t(t) * D);
  }, size_t(pieces) * tokens * D);
}

constexpr int BLOCK = W == 16 ? 128 : 96;  // neurons whose records fit in the second-level cache
constexpr int TILE = 8, COLUMNS = TILE * W;  // vectors, and columns, of y that stay in registers

// A block's entries are its pairs of a token and an active neuron, token by token.
template <class T>
class Prefill {
 public:
  Prefill(const FFN<T>& m, Pool& pool)
      : m(m), scores(m, pool), blocks((m.d_ff + BLOCK - 1) / BLOCK), room(size_t(BLOCK) * m.tokens + W), used(size_t(blocks) * BLOCK),
        starts(size_t(blocks) * (m.tokens + 1)), rows(blocks * room), weights(blocks * room) {}

  void run(Pool& pool) {
    parallel(pool, blocks, [&](int b) { list_entries(b); });
    for (int f = 0; f < m.d_ff; ++f) *m.read += used[f];
    const int pieces = min(blocks, 4 * pool.threads());
    parallel(pool, pieces, [&](int i) {
      for (int b = blocks * i / pieces, end = blocks * (i + 1) / pieces; b < end; ++b) multiply_by_k2(b, b + 1 < end);
    });
    const int tiles = (m.d_model + COLUMNS - 1) / COLUMNS, parts = min(tiles, pool.threads());
    parallel(pool, parts, [&](int i) { sum_v(tiles * i / parts * COLUMNS, min(m.d_model, tiles * (i + 1) / parts * COLUMNS)); });
  }

 private:
  const FFN<T>& m;
  const Scores<T> scores;
  const int blocks;
  const size_t room;       // for the entries of a block
  Scratch<uint8_t> used;   // (blocks, BLOCK) is the neuron active for any token?
  Scratch<int> starts;     // (blocks, tokens + 1) each token's first entry
  Scratch<int> rows;       // (blocks, room) each entry's neuron, within its block
  Scratch<float> weights;  // (blocks, room) each entry's weight of V

  void list_entries(int b) {
    const int lo = b * BLOCK, n = min(BLOCK, m.d_ff - lo);
    int *start = starts + size_t(b) * (m.tokens + 1), *row = rows + b * room;
    float* weight = weights + b * room;
    std::memset(used + lo, 0, BLOCK);
    start[0] = 0;
    for (int t = 0, p = 0; t < m.tokens; start[++t] = p) {
      const int found = compact(scores.of(t) + lo, n, scores.thresholds[t], row + p, weight + p);
      scores.activate(t, weight + p, found);
      for (const int end = p + found; p < end; ++p) used[lo + row[p]] = 1;
    }
  }

  // Prefetches some columns of block b's records. Each token prefetches an equal share of the neurons.
  INLINE void prefetch_share(int b, int t, int begin, int columns) const {
    for (int i = BLOCK * t / m.tokens; i < BLOCK * (t + 1) / m.tokens; ++i)
      if (used[b * BLOCK + i]) {
        const char* from = reinterpret_cast<const char*>(record(m, size_t(b) * BLOCK + i) + begin);
        for (size_t byte = 0; byte < sizeof(T) * columns; byte += CACHE_LINE) prefetch(from + byte);
      }
  }

  void multiply_by_k2(int b, bool more) {
    const int D = m.d_model, rest = D - m.r, *start = starts + size_t(b) * (m.tokens + 1), *row = rows + b * room;
    float* weight = weights + b * room;
    for (int t = 0; t < m.tokens; ++t) {
      if (more) prefetch_share(b + 1, t, 0, rest);
      const float* q2 = scores.x + size_t(t) * D + m.r;
      groups_of_four(start[t + 1] - start[t], [&](auto size, int i) {
        constexpr int R = decltype(size)::value;
        const T* k2[R];
        float out[R][1];
        const int p = start[t] + i;
        for (int c = 0; c < R; ++c) k2[c] = record(m, size_t(b) * BLOCK + row[p + c]);
        dots<R, 1>(k2, &q2, rest, out);
        for (int c = 0; c < R; ++c) weight[p + c] *= out[c][0] * record_scale(m, size_t(b) * BLOCK + row[p + c]);
      });
    }
  }

  // Columns [lo, hi) of y.
  void sum_v(int lo, int hi) {
    const int D = m.d_model, rest = D - m.r, width = hi - lo;
    Scratch<float> y(size_t(m.tokens) * width);
    std::memset(y, 0, sizeof(float) * m.tokens * width);
    for (int b = 0; b < blocks; ++b) {
      const int *start = starts + size_t(b) * (m.tokens + 1), *row = rows + b * room;
      const float* weight = weights + b * room;
      for (int begin = lo; begin < hi; begin += COLUMNS)
        for (int t = 0; t < m.tokens; ++t) {
          if (b + 1 < blocks) prefetch_share(b + 1, t, rest + begin, min(COLUMNS, hi - begin));
          float* to = y + size_t(t) * width + (begin - lo);
          auto v = [&](int p) { return record(m, size_t(b) * BLOCK + row[p]) + rest + begin; };
          if (begin + COLUMNS <= hi) {
            VecF acc[TILE];
#pragma GCC unroll 8
            for (int c = 0; c < TILE; ++c) acc[c] = load(to + c * W);
            for (int p = start[t]; p < start[t + 1]; ++p)
#pragma GCC unroll 8
              for (int c = 0; c < TILE; c += 2) {
                const Pair pair = load_pair(v(p) + c * W);
                acc[c] += weight[p] * pair.first;
                acc[c + 1] += weight[p] * pair.second;
              }
#pragma GCC unroll 8
            for (int c = 0; c < TILE; ++c) store(to + c * W, acc[c]);
          } else {
            for (int p = start[t]; p < start[t + 1]; ++p) axpy<1>(v(p), weight + p, &to, hi - begin);
          }
        }
    }
    for (int t = 0; t < m.tokens; ++t) from_pair_order<T>(y + size_t(t) * width, width, m.y + size_t(t) * D + lo);
  }
};

template <class T>
void ffn(const FFN<T>& m, Pool& pool) {
  *m.read = 0;
  for (int t = 0; t < m.tokens; t += 64) {
    FFN<T> chunk = m;
    chunk.tokens = min(64, m.tokens - t);
    chunk.x += size_t(t) * m.d_model;
    chunk.y += size_t(t) * m.d_model;
    chunk.active += t;
    if (chunk.tokens <= DECODE_TOKENS)
      ffn_decode(chunk, pool);
    else
      Prefill<T>(chunk, pool).run(pool);
  }
}

}  // namespace
}  // namespace spark::SPARK_SET
