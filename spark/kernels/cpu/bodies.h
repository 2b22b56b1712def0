// The lookups on vectors of SPARK_WIDTH floats, in the compilers' vector extension: one body for every instruction set.
// Weights are float, bf16 or int8_t with a scale per row; everything is computed in float32.

namespace spark::SPARK_SET {
namespace {

constexpr int W = SPARK_WIDTH;
typedef float Float __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * W)));
typedef int8_t Byte __attribute__((vector_size(W)));

#define INLINE inline __attribute__((always_inline))

template <class V, class T>
INLINE V raw(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE Float load(const float* p) { return raw<Float>(p); }
#if SPARK_WIDTH == 16  // what the compilers make of convertvector takes twice the instructions
INLINE Int widen(const int8_t* p) { return (Int)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
#elif SPARK_WIDTH == 8
INLINE Int widen(const int8_t* p) { return (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
INLINE Int widen(const int8_t* p) { return __builtin_convertvector(raw<Byte>(p), Int); }
#endif
INLINE Float load(const int8_t* p) { return __builtin_convertvector(widen(p), Float); }

// Vectors of weights come in twos: of bf16 the even and the odd columns of 2 W, which is one operation each instead of two; of others
// the first and the second half. `arrange` brings what they meet into that order, but for the last n % (2 W), and `restore` back.
INLINE Float half(const bf16* p, int h) {
  Unsigned v = raw<Unsigned>(p);
  return (Float)(h ? v & 0xffff0000u : v << 16);
}
template <class T>
INLINE Float half(const T* p, int h) { return load(p + h * W); }

template <class T>
void arrange(const float* from, int n, float* to) {
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
void restore(const float* from, int n, float* to) {
  int i = 0;
  if constexpr (std::is_same_v<T, bf16>)
    for (; i + 2 * W <= n; i += 2 * W)
      for (int j = 0; j < W; ++j) {
        to[i + 2 * j] = from[i + j];
        to[i + 2 * j + 1] = from[i + W + j];
      }
  std::memcpy(to + i, from + i, sizeof(float) * (n - i));
}

INLINE void store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE float scalar(float x) { return x; }
INLINE float scalar(int8_t x) { return x; }
INLINE float scalar(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
INLINE void put(float* to, float x) { *to = x; }
INLINE void put(bf16* to, float x) {  // rounded to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  to->bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
INLINE Float all(float x) { return x - Float{}; }
INLINE Float select(Int mask, Float a, Float b) { return (Float)((mask & (Int)a) | (~mask & (Int)b)); }
INLINE Float max(Float a, Float b) { return select(a > b, a, b); }

INLINE float sum(Float v) {
#if SPARK_WIDTH == 16
  auto w = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  auto w = v;
#endif
#if SPARK_WIDTH >= 8
  auto x = __builtin_shufflevector(w, w, 0, 1, 2, 3) + __builtin_shufflevector(w, w, 4, 5, 6, 7);
#else
  auto x = w;
#endif
  return (x[0] + x[2]) + (x[1] + x[3]);
}

// e^x to 2 units in the last place; 0 below -87.
INLINE Float exp(Float x) {
  x = max(select(x > all(88), all(88), x), all(-104));
  Int n = __builtin_convertvector(x * 1.44269504f + select(x > all(0), all(0.5f), all(-0.5f)), Int);
  Float m = __builtin_convertvector(n, Float);
  x = x - m * 0.693359375f + m * 2.12194440e-4f;
  Float p = ((((x * 1.9875691500e-4f + 1.3981999507e-3f) * x + 8.3334519073e-3f) * x + 4.1665795894e-2f) * x + 1.6666665459e-1f) * x;
  p = (p + 5.0000001201e-1f) * x * x + x + 1.0f;
  return select(n < -126, all(0), p * (Float)((n + 127) << 23));
}
INLINE Float tanh(Float x) {
  Float t = exp(-2.0f * max(x, -x));
  Float y = (1.0f - t) / (1.0f + t);
  return select(x < all(0), -y, y);
}
INLINE Float gelu(Float x) { return 0.5f * x * (1.0f + tanh(0.7978845608f * x * (1.0f + 0.044715f * x * x))); }
// log(1 + e^x), accurate where it is tiny too: log1p(u) = 2 artanh(u / (2 + u)).
INLINE Float softplus(Float x) {
  Float u = exp(-max(x, -x)), s = u / (2.0f + u), z = s * s;
  Float p = all(1.0f / 17);
  for (int n = 15; n > 0; n -= 2) p = p * z + 1.0f / n;
  return max(x, all(0)) + 2.0f * s * p;
}
template <class F>
INLINE void each(float* x, int n, F f) {
  int i = 0;
  for (; i + W <= n; i += W) store(x + i, f(load(x + i)));
  if (i < n) {
    float last[W] = {};
    __builtin_memcpy(last, x + i, 4 * (n - i));
    store(last, f(load(last)));
    __builtin_memcpy(x + i, last, 4 * (n - i));
  }
}

template <class T>
class Scratch {
 public:
  explicit Scratch(size_t n) : p_(static_cast<T*>(std::malloc((n ? n : 1) * sizeof(T)))) {
    if (!p_) std::abort();
  }
  ~Scratch() { std::free(p_); }
  Scratch(const Scratch&) = delete;
  operator T*() const { return p_; }

 private:
  T* p_;
};

// f(i) for i in [0, n); by one thread if `work`, in floats that go by, is too little to share.
template <class F>
void parallel(Pool& pool, int n, F f, size_t work = 1 << 20) {
  if (work < 1 << 16)
    for (int i = 0; i < n; ++i) f(i);
  else
    pool.run(n, [](void* context, int i) { (*static_cast<F*>(context))(i); }, &f);
}

INLINE int least(int a, int b) { return a < b ? a : b; }
INLINE int most(int a, int b) { return a > b ? a : b; }
constexpr int LINE = 64;
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the second-level cache, which takes more at a time

// out[r][c] = w[r] . x[c], n long, x arranged: R + C loads for R C products. With Fetch, what lies `ahead` of w is on its way meanwhile.
template <int R, int C, bool Fetch = false, class T>
INLINE void dots(const T* const* w, const float* const* x, int n, float (*out)[C], [[maybe_unused]] ptrdiff_t ahead = 0) {
  constexpr int U = R * C >= 6 ? 1 : R * C >= 3 ? 2 : 4;  // sums side by side, so that additions need not wait for each other
  constexpr int S = U > 2 ? U : 2;
  Float acc[U][R][C] = {};
  auto step = [&](int i, int h, int u) __attribute__((always_inline)) {
    Float a[R];
    if constexpr (Fetch)
      if (h == 0 || sizeof(T) * W >= LINE)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) prefetch(w[r] + i + h * W + ahead);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = half(w[r] + i, h);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Float b = load(x[c] + i + h * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[u][r][c] += a[r] * b;
    }
  };
  int i = 0;
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
      out[r][c] = sum(acc[0][r][c]);
    }
  for (; i < n; ++i)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) out[r][c] += scalar(w[r][i]) * x[c][i];
}

// Rows [0, rows) of w against `tokens` rows of x: y[t * y_stride + o]. As many of each at a time as there are registers for.
constexpr int ROWS = W == 16 ? 6 : 3, TOKENS = 4, CACHE = 400 << 10;

template <int R, int C, class T>
INLINE void block(const T* w, size_t w_stride, const float* scales, const float* x, size_t x_stride, int n, float* y, size_t y_stride,
                  size_t ahead) {
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

template <int C, class T>
INLINE void some_tokens(int rows, const T* w, size_t w_stride, const float* scales, const float* x, size_t x_stride, int n, float* y,
                        size_t y_stride, bool fetch) {
  // A single token's arithmetic hides behind its reads, and row after row is what the processor fetches ahead best.
  constexpr int R = C == 1 ? 1 : C == 2 ? 3 : ROWS;
  int o = 0;
  if constexpr (R > 1)
    for (; o + R <= rows; o += R)
      block<R, C>(w + o * w_stride, w_stride, scales ? scales + o : scales, x, x_stride, n, y + o, y_stride, fetch ? 6 * w_stride : 0);
  for (; o < rows; ++o) block<1, C>(w + o * w_stride, w_stride, scales ? scales + o : scales, x, x_stride, n, y + o, y_stride, 0);
}

template <class T>
void product(int rows, int tokens, const T* w, size_t w_stride, const float* scales, const float* x, size_t x_stride, int n, float* y,
             size_t y_stride) {
  // As many rows as stay in the second-level cache go past all tokens; a few tokens stay in the first.
  const int some = tokens <= TOKENS ? rows : most(ROWS, int(CACHE / (sizeof(T) * n)) / ROWS * ROWS);
  for (int o = 0; o < rows; o += some) {
    const int here = least(some, rows - o);
    auto go = [&](auto size, int t) {
      some_tokens<decltype(size)::value>(here, w + o * w_stride, w_stride, scales ? scales + o : scales, x + t * x_stride, x_stride, n,
                                         y + t * y_stride + o, y_stride, t == 0);
    };
    int t = 0;
    for (; t + TOKENS <= tokens; t += TOKENS) go(std::integral_constant<int, TOKENS>{}, t);
    if constexpr (TOKENS > 2)
      for (; t + 2 <= tokens; t += 2) go(std::integral_constant<int, 2>{}, t);
    for (; t < tokens; ++t) go(std::integral_constant<int, 1>{}, t);
  }
}

// Calls f(begin, end) on pieces of [0, n), about four for each thread, and not smaller than makes sense.
template <class F>
void ranges(Pool& pool, int n, int smallest, F f) {
  int size = most(smallest, (n + 4 * pool.threads() - 1) / (4 * pool.threads()));
  size = (size + 11) / 12 * 12;  // whole blocks of rows
  parallel(pool, (n + size - 1) / size, [&](int i) { f(i * size, least(n, (i + 1) * size)); });
}

struct Moments { float mean, std; };

// In two passes, which cost nothing where the scores are in cache; the variance over n - 1.
INLINE Moments moments(const float* s, int n) {
  Float total = {};
  int i = 0;
  for (; i + W <= n; i += W) total += load(s + i);
  float mean = sum(total);
  for (; i < n; ++i) mean += s[i];
  mean /= n;
  Float squares = {};
  for (i = 0; i + W <= n; i += W) {
    Float d = load(s + i) - mean;
    squares += d * d;
  }
  float variance = sum(squares);
  for (; i < n; ++i) variance += (s[i] - mean) * (s[i] - mean);
  return {mean, std::sqrt(variance / most(n - 1, 1))};
}

INLINE float largest(const float* s, int n) {
  if (n < W) {
    float m = s[0];
    for (int i = 1; i < n; ++i) m = s[i] > m ? s[i] : m;
    return m;
  }
  Float m = load(s);
  for (int i = W; i + W <= n; i += W) m = max(m, load(s + i));
  m = max(m, load(s + n - W));
  float most = m[0];
  for (int i = 1; i < W; ++i) most = m[i] > most ? m[i] : most;
  return most;
}

// The entries of s[0..n) that are at least theta, side by side in `kept`, their places in `list`; both with room for n + W. How many.
INLINE int compact(const float* s, int n, float theta, int* list, float* kept) {
  int count = 0, i = 0;
#if SPARK_WIDTH == 16
  __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + W <= n; i += W) {
    const __m512 v = _mm512_loadu_ps(s + i);
    const __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_set1_ps(theta), _CMP_GE_OQ);
    _mm512_storeu_ps(kept + count, _mm512_maskz_compress_ps(mask, v));
    _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(mask, places));
    places = _mm512_add_epi32(places, _mm512_set1_epi32(W));
    count += __builtin_popcount(mask);
  }
#elif SPARK_WIDTH == 8
  for (; i + W <= n; i += W) {
    int mask = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(s + i), _mm256_set1_ps(theta), _CMP_GE_OQ));
    for (; mask; mask &= mask - 1) {
      list[count] = i + __builtin_ctz(mask);
      kept[count] = s[list[count]];
      ++count;
    }
  }
#endif
  for (; i < n; ++i) {
    list[count] = i;
    kept[count] = s[i];
    count += s[i] >= theta;
  }
  return count;
}

// y[c][0..n) += a[c] * v, y arranged, for tokens that share a row.
template <int C, bool Fetch = false, class T>
INLINE void spread(const T* v, const float* a, float* const* y, int n, [[maybe_unused]] ptrdiff_t ahead = 0) {
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      if constexpr (Fetch)
        if (h == 0 || sizeof(T) * W >= LINE) prefetch(v + i + h * W + ahead);
      Float b = half(v + i, h);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) store(y[c] + i + h * W, load(y[c] + i + h * W) + a[c] * b);
    }
  for (; i < n; ++i)
    for (int c = 0; c < C; ++c) y[c][i] += a[c] * scalar(v[i]);
}

// f(size, is it the first, start) for groups of four, and then of one.
template <class F>
INLINE void by_fours(int n, F f) {
  using std::integral_constant;
  if (n <= 0) return;
  int i = n >= 4 ? 4 : 1;
  if (i == 4)
    f(integral_constant<int, 4>{}, std::true_type{}, 0);
  else
    f(integral_constant<int, 1>{}, std::true_type{}, 0);
  for (; i + 4 <= n; i += 4) f(integral_constant<int, 4>{}, std::false_type{}, i);
  for (; i < n; ++i) f(integral_constant<int, 1>{}, std::false_type{}, i);
}

template <class T>
void matmul(const Matmul<T>& m, Pool& pool) {
  Scratch<float> x(size_t(m.tokens) * m.in);
  parallel(pool, m.tokens, [&](int t) { arrange<T>(m.x + size_t(t) * m.in, m.in, x + size_t(t) * m.in); }, size_t(m.tokens) * m.in);
  ranges(pool, m.out, 16, [&](int lo, int hi) {
    product(hi - lo, m.tokens, m.w.values + size_t(lo) * m.in, m.in, m.w.scales ? m.w.scales + lo : nullptr, x, m.in, m.in, m.y + lo, m.out);
  });
}

// The sum of an array, which is the fastest way to read it: what memory can give.
void read(const Read& m, Pool& pool) {
  const int64_t piece = 1 << 16, pieces = (m.n + piece - 1) / piece;
  Scratch<float> sums(pieces);
  parallel(pool, int(pieces), [&](int i) {
    const float* x = m.x + i * piece;
    const int n = int(m.n - i * piece < piece ? m.n - i * piece : piece);
    Float acc[8] = {};
    int j = 0;
    for (; j + 8 * W <= n; j += 8 * W)
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) acc[c] += load(x + j + c * W);
    float total = 0;
    for (int c = 0; c < 8; ++c) total += sum(acc[c]);
    for (; j < n; ++j) total += x[j];
    sums[i] = total;
  });
  *m.y = 0;
  for (int64_t i = 0; i < pieces; ++i) *m.y += sums[i];
}

// At most 64 tokens at a time: which of them activate a neuron are the bits of a word, and its record is read once for all.
template <class T>
void ffn_tile(const FFN<T>& m, Pool& pool) {
  const int D = m.d_model, F = m.d_ff, r = m.r, rest = D - r, width = rest + D, tokens = m.tokens;
  const bool everything = m.quantile == -INFINITY;
  Scratch<float> scores(size_t(tokens) * F), thresholds(tokens), x(size_t(tokens) * D);
  parallel(pool, tokens, [&](int t) {
    arrange<T>(m.x + size_t(t) * D, r, x + size_t(t) * D);
    arrange<T>(m.x + size_t(t) * D + r, rest, x + size_t(t) * D + r);
  }, size_t(tokens) * D);
  ranges(pool, F, 64, [&](int lo, int hi) {
    product(hi - lo, tokens, m.k1.values + size_t(lo) * r, r, m.k1.scales ? m.k1.scales + lo : nullptr, x, D, r, scores + lo, F);
  });
  parallel(pool, tokens, [&](int t) {
    const float* s = scores + size_t(t) * F;
    int n = F;
    thresholds[t] = m.quantile;
    if (!everything) {
      Moments found = moments(s, F);
      thresholds[t] = found.mean + found.std * m.quantile;
      n = 0;
      for (int f = 0; f < F; ++f) n += s[f] > thresholds[t];
    }
    m.active[t] = n;
  });

  // Each piece adds up its own y, so that sums do not depend on who runs what.
  const int pieces = least(F, pool.threads() * (tokens <= 16 ? 4 : 1));
  Scratch<float> sums(size_t(pieces) * tokens * D);
  parallel(pool, pieces, [&](int piece) {
    const int lo = int64_t(F) * piece / pieces, hi = int64_t(F) * (piece + 1) / pieces;
    float* y = sums + size_t(piece) * tokens * D;
    std::memset(y, 0, sizeof(float) * tokens * D);
    Scratch<uint64_t> who(hi - lo);
    std::memset(who, 0, sizeof(uint64_t) * (hi - lo));
    int pairs = 0;
    for (int t = 0; t < tokens; ++t) {
      const float *s = scores + size_t(t) * F + lo, theta = thresholds[t];
      for (int f = 0; f < hi - lo; ++f) who[f] |= uint64_t(s[f] > theta) << t;
    }
    Scratch<int> list(hi - lo + 1), starts(hi - lo + 1);
    int n = 0;
    for (int f = 0; f < hi - lo; ++f) {
      list[n] = lo + f;
      starts[n] = pairs;
      n += who[f] != 0;
      pairs += __builtin_popcountll(who[f]);
    }
    starts[n] = pairs;
    // One entry per pair of an active neuron and a token, neuron after neuron.
    Scratch<int> token(pairs);
    Scratch<float> weight(pairs);
    for (int j = 0, p = 0; j < n; ++j)
      for (uint64_t bits = who[list[j] - lo]; bits; bits &= bits - 1, ++p) {
        token[p] = __builtin_ctzll(bits);
        float s = scores[size_t(token[p]) * F + list[j]];
        float above = everything ? s : s - thresholds[token[p]];
        if (m.huber > 0 && !everything) above = above < m.huber ? above * above / (2 * m.huber) : above - m.huber / 2;
        weight[p] = above;
      }
    each(weight, pairs, [&](Float x) { return gelu(x); });

    auto record = [&](int j) { return m.records.values + size_t(list[least(j, n - 1)]) * width; };
    if (tokens <= 4) {  // record by record, each one run of memory, while the one after the next is on its way
      for (int j = 0; j < n; ++j) {
        const T* k2 = record(j);
        const ptrdiff_t ahead = record(j + 2) - k2;
        const float scale = m.records.scales ? m.records.scales[2 * size_t(list[j])] * m.records.scales[2 * size_t(list[j]) + 1] : 1.0f;
        by_fours(starts[j + 1] - starts[j], [&](auto size, auto first, int i) {
          constexpr int C = decltype(size)::value;
          const float* q2[C];
          float out[1][C];
          for (int c = 0; c < C; ++c) q2[c] = x + size_t(token[starts[j] + i + c]) * D + r;
          dots<1, C, decltype(first)::value>(&k2, q2, rest, out, ahead);
          for (int c = 0; c < C; ++c) weight[starts[j] + i + c] *= out[0][c] * scale;
        });
        by_fours(starts[j + 1] - starts[j], [&](auto size, auto first, int i) {
          constexpr int C = decltype(size)::value;
          float* to[C];
          for (int c = 0; c < C; ++c) to[c] = y + size_t(token[starts[j] + i + c]) * D;
          spread<C, decltype(first)::value>(k2 + rest, weight + starts[j] + i, to, D, ahead);
        });
      }
      return;
    }
    // Some records, and token by token what they add: a token's query, or some columns of its y, stay in the nearest cache or in
    // registers while the records that it activates come from the next one. Meanwhile the next records are on their way.
    constexpr int SOME = 96, C = 8, LINES = LINE / int(sizeof(T));
    Scratch<int> from(tokens + 1);
    Scratch<const T*> row(size_t(SOME) * tokens);
    Scratch<float> a(size_t(SOME) * tokens), scales(size_t(SOME) * tokens);
    for (int j0 = 0; j0 < n; j0 += SOME) {
      const int j1 = least(n, j0 + SOME), next = least(n, j1 + SOME) - j1;
      std::memset(from, 0, sizeof(int) * (tokens + 1));
      for (int p = starts[j0]; p < starts[j1]; ++p) ++from[token[p] + 1];
      for (int t = 0; t < tokens; ++t) from[t + 1] += from[t];
      for (int j = j0; j < j1; ++j)
        for (int p = starts[j]; p < starts[j + 1]; ++p) {
          const int place = from[token[p]]++;
          row[place] = record(j);
          a[place] = weight[p];
          if (m.records.scales) scales[place] = m.records.scales[2 * size_t(list[j])] * m.records.scales[2 * size_t(list[j]) + 1];
        }
      for (int t = 0, p = 0; t < tokens; p = from[t++]) {
        for (int j = j0 + (j1 - j0) * t / tokens; j < j0 + (j1 - j0) * (t + 1) / tokens; ++j)
          for (int i = 0; i < C * W; i += LINES) prefetch(record(j) + rest + i);
        const float* q2 = x + size_t(t) * D + r;
        by_fours(from[t] - p, [&](auto size, auto, int i) {
          constexpr int R = decltype(size)::value;
          float out[R][1];
          dots<R, 1>(row + p + i, &q2, rest, out);
          for (int c = 0; c < R; ++c) a[p + i + c] *= m.records.scales ? out[c][0] * scales[p + i + c] : out[c][0];
        });
      }
      const int tiles = (D + C * W - 1) / (C * W), lines = (rest + LINES - 1) / LINES;
      for (int tile = 0; tile < tiles; ++tile)
        for (int t = 0, p = 0; t < tokens; p = from[t++]) {
          const int begin = tile * C * W;
          for (int j = j0 + (j1 - j0) * t / tokens; j < j0 + (j1 - j0) * (t + 1) / tokens; ++j)
            for (int i = 0; i < C * W; i += LINES) prefetch(record(j) + rest + begin + C * W + i);
          const int64_t turn = int64_t(tile) * tokens + t, turns = int64_t(tiles) * tokens, all = int64_t(next) * lines;
          for (int64_t i = all * turn / turns; i < all * (turn + 1) / turns; ++i) prefetch(record(j1 + i / lines) + i % lines * LINES);
          float* to = y + size_t(t) * D + begin;
          if (begin + C * W <= D) {
            Float acc[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) acc[c] = load(to + c * W);
            for (int i = p; i < from[t]; ++i)
#pragma GCC unroll 8
              for (int c = 0; c < C; ++c) acc[c] += a[i] * half(row[i] + rest + begin + c / 2 * 2 * W, c % 2);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) store(to + c * W, acc[c]);
          } else {
            for (int i = p; i < from[t]; ++i) spread<1>(row[i] + rest + begin, a + i, &to, D - begin);
          }
        }
    }
  });
  parallel(pool, tokens, [&](int t) {
    float* y = sums + size_t(t) * D;
    for (int piece = 1; piece < pieces; ++piece) {
      const float* from = sums + (size_t(piece) * tokens + t) * D;
      for (int i = 0; i < D; ++i) y[i] += from[i];
    }
    restore<T>(y, D, m.y + size_t(t) * D);
  }, size_t(pieces) * tokens * D);
}

template <class T>
void ffn(const FFN<T>& m, Pool& pool) {
  for (int t = 0; t < m.tokens; t += 64) {
    FFN<T> part = m;
    part.tokens = least(64, m.tokens - t);
    part.x += size_t(t) * m.d_model;
    part.y += size_t(t) * m.d_model;
    part.active += t;
    ffn_tile(part, pool);
  }
}

// y[r] += sum over p of a[r][p] v[p], y arranged, for R rows of weights: the values of p are converted once for all rows.
template <int R, class T>
INLINE void mix(const float* a, size_t a_stride, const T* v, size_t v_stride, int n, float* y, size_t y_stride, int width) {
  int i = 0;
  auto columns = [&](auto count) __attribute__((always_inline)) {
    constexpr int C = decltype(count)::value;
    Float acc[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) acc[r][c] = load(y + r * y_stride + i + c * W);
    for (int p = 0; p < n; ++p) {
      Float b[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) b[c] = half(v + p * v_stride + i + c / 2 * 2 * W, c % 2);
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
      for (int p = 0; p < n; ++p) y[r * y_stride + i] += a[r * a_stride + p] * scalar(v[p * v_stride + i]);
}

template <class T>
void attention(const Attention<T>& m, Pool& pool) {
  const int d = m.head_dim, r = m.r, rest = d - r, width = rest + d, S = m.slots, G = m.group, L = m.tokens;
  const int step = most(1, least(L, 12 / G)), blocks = (L + step - 1) / step;
  parallel(pool, m.batch * m.heads, [&](int head) {
    for (int l = 0; l < L; ++l) {
      const float* from = m.fresh + (size_t(head) * L + l) * 2 * d;
      const size_t slot = size_t(head) * S + (m.length + l) % S;
      for (int i = 0; i < r; ++i) put(m.keys + slot * r + i, from[i]);
      for (int i = 0; i < width; ++i) put(m.records + slot * width + i, from[r + i]);
    }
  }, size_t(m.batch) * m.heads * L * 2 * d);
  parallel(pool, m.batch * m.heads * blocks, [&](int task) {
    const int head = task / blocks, b = head / m.heads;
    const int l0 = (blocks - 1 - task % blocks) * step, l1 = least(L, l0 + step);  // the longest first
    const T *keys = m.keys + size_t(head) * S * r, *records = m.records + size_t(head) * S * width;
    // A token that pads its row sees itself alone.
    auto from = [&](int place) { return least(place, most(m.first[b], m.window ? place - m.window + 1 : 0)); };
    const int begin = from(m.length + l0), end = m.length + l1, span = end - begin, n = (l1 - l0) * G;
    Scratch<float> q(size_t(n) * d), scores(size_t(n) * span), y(size_t(n) * d), weights(span + W), gate(span);
    Scratch<int> list(span + W);
    for (int g = 0; g < G; ++g)
      for (int l = l0; l < l1; ++l) {
        const float* query = m.q + ((size_t(head) * G + g) * L + l) * d;
        float* to = q + size_t(g * (l1 - l0) + l - l0) * d;
        arrange<T>(query, r, to);
        arrange<T>(query + r, rest, to + r);
      }
    std::memset(y, 0, sizeof(float) * n * d);
    // Places are contiguous in the ring but for where it wraps.
    auto runs = [&](auto f) {
      for (int p = begin; p < end;) {
        int slot = p % S, length = least(end - p, S - slot);
        f(p - begin, slot, length);
        p += length;
      }
    };
    runs([&](int at, int slot, int length) {
      product(length, n, keys + size_t(slot) * r, r, nullptr, q, d, r, scores + at, span);
    });
    for (int i = 0; i < n; ++i) {
      const int l = l0 + i % (l1 - l0), place = m.length + l, lo = from(place), visible = place - lo + 1;
      float *row = scores + size_t(i) * span, *s = row + (lo - begin);
      const float top = largest(s, visible);
      int count = visible;
      float theta = -INFINITY;
      if (m.k && visible > m.k) {
        Moments found = moments(s, visible);
        theta = found.mean + found.std * m.quantiles[visible];
        theta = theta < top ? theta : top;
      }
      const float cap = m.cap, high = cap ? cap * std::tanh(top / cap) : top;
      auto weigh = [&](Float x) { return exp((cap ? cap * tanh(x / cap) : x) - high); };
      if (m.k) {
        count = compact(s, visible, theta, list, weights);
        each(weights, count, weigh);
        float total = 0;
        for (int j = 0; j < count; ++j) total += weights[j];
        // What survives: the rest of its key, and its value, side by side.
        const int start = lo % S;
        auto at = [&](int j) {
          const int slot = start + list[least(j, count - 1)];
          return records + size_t(slot < S ? slot : slot - S) * width;
        };
        const float* q2 = q + size_t(i) * d + r;
        by_fours(count, [&](auto size, auto, int j) {
          constexpr int R = decltype(size)::value;
          const T* k2[R];
          float out[R][1];
          for (int c = 0; c < R; ++c) {
            k2[c] = at(j + c);
            const char* ahead = reinterpret_cast<const char*>(at(j + c + 8));
            for (size_t byte = 0; byte < sizeof(T) * width; byte += LINE) prefetch(ahead + byte);
          }
          dots<R, 1>(k2, &q2, rest, out);
          for (int c = 0; c < R; ++c) gate[j + c] = out[c][0];
        });
        each(gate, count, [&](Float x) { return softplus(x); });
        float* to = y + size_t(i) * d;
        for (int j = 0; j < count; ++j) weights[j] *= gate[j] / total;
        constexpr int C = 8;
        int column = 0;
        for (; column + C * W <= d; column += C * W) {
          Float acc[C] = {};
          for (int j = 0; j < count; ++j) {
            const T* v = at(j) + rest + column;
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) acc[c] += weights[j] * half(v + c / 2 * 2 * W, c % 2);
          }
          for (int c = 0; c < C; ++c) store(to + column + c * W, acc[c]);
        }
        if (column < d)
          for (int j = 0; j < count; ++j) {
            float* tail = to + column;
            spread<1>(at(j) + rest + column, weights + j, &tail, d - column);
          }
      } else {
        each(s, visible, weigh);
        Float parts = {};
        int j = 0;
        for (; j + W <= visible; j += W) parts += load(s + j);
        float total = sum(parts);
        for (; j < visible; ++j) total += s[j];
        for (j = 0; j < visible; ++j) s[j] /= total;
        for (j = 0; j < lo - begin; ++j) row[j] = 0;
        for (j = lo - begin + visible; j < span; ++j) row[j] = 0;
      }
      m.attended[(size_t(head) * G + i / (l1 - l0)) * L + l] = count;
    }
    if (!m.k)
      runs([&](int at, int slot, int length) {
        by_fours(n, [&](auto size, auto, int i) {
          constexpr int R = decltype(size)::value;
          mix<R>(scores + size_t(i) * span + at, span, records + size_t(slot) * width + rest, width, length, y + size_t(i) * d, d, d);
        });
      });
    for (int i = 0; i < n; ++i) {
      const int g = i / (l1 - l0), l = l0 + i % (l1 - l0);
      restore<T>(y + size_t(i) * d, d, m.y + ((size_t(head) * G + g) * L + l) * d);
    }
  });
}

}  // namespace

void look_up(const Matmul<float>& m, Pool& pool) { matmul(m, pool); }
void look_up(const Matmul<bf16>& m, Pool& pool) { matmul(m, pool); }
void look_up(const Matmul<int8_t>& m, Pool& pool) { matmul(m, pool); }
void look_up(const FFN<float>& m, Pool& pool) { ffn(m, pool); }
void look_up(const FFN<bf16>& m, Pool& pool) { ffn(m, pool); }
void look_up(const FFN<int8_t>& m, Pool& pool) { ffn(m, pool); }
void look_up(const Attention<float>& m, Pool& pool) { attention(m, pool); }
void look_up(const Attention<bf16>& m, Pool& pool) { attention(m, pool); }
void look_up(const Read& m, Pool& pool) { read(m, pool); }

#undef INLINE

}  // namespace spark::SPARK_SET
