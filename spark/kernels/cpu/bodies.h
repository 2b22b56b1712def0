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
struct Two { Float first, second; };
INLINE Two two(const bf16* p) {  // both halves by one load, where loads are what there are too few of
  Unsigned v = raw<Unsigned>(p);
#if defined(__x86_64__)
  asm("" : "+v"(v));  // or the compiler makes two of it
#endif
  return {(Float)(v << 16), (Float)(v & 0xffff0000u)};
}
template <class T>
INLINE Two two(const T* p) { return {load(p), load(p + W)}; }

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

typedef float Four __attribute__((vector_size(16)));
INLINE Four fold(Float v) {  // the sum of its runs of four
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
INLINE float sum(Float v) {
  Four x = fold(v);
  return (x[0] + x[2]) + (x[1] + x[3]);
}
// The sums of N vectors, four at a time: halves of each run of four are added and laid side by side, twice, until a run holds four
// vectors' sums. A third of the operations that `sum` takes for each, and short rows are mostly sums.
template <int A, int B, size_t... I>  // from run to run a[0 and A], b[0 and A], beside each other by B, plus the two after
INLINE Float halved(Float a, Float b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / A % 2 + I % 4 / B % 2 * W)...) +
         __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / A % 2 + I % 4 / B % 2 * W + 2)...);
}
template <int N>
INLINE void sums(const Float* v, float* out) {
  constexpr auto places = std::make_index_sequence<W>{};
  int i = 0;
#pragma GCC unroll 8
  for (; i + 4 <= N; i += 4) {
    const Float ab = halved<2, 1>(v[i], v[i + 1], places), cd = halved<2, 1>(v[i + 2], v[i + 3], places);
    const Four four = fold(halved<1, 2>(ab, cd, places));
    __builtin_memcpy(out + i, &four, sizeof four);
  }
#pragma GCC unroll 4
  for (; i < N; ++i) out[i] = sum(v[i]);
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
  explicit Scratch(size_t n) : p_(static_cast<T*>(take(n * sizeof(T)))) {}
  ~Scratch() { give_back(p_); }
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
  if constexpr (C == 1 && U == 2 && !Fetch)  // many rows for one token: loads are what it waits for
    for (; i + 2 * W <= n; i += 2 * W) {
      const Float first = load(x[0] + i), second = load(x[0] + i + W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Two a = two(w[r] + i);
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
  sums<R * C>(&acc[0][0][0], &out[0][0]);
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
  // A single token's arithmetic hides behind its reads, and row after row is what the processor fetches ahead best; but for bytes,
  // of which it works on too few lines at a time.
  constexpr int R = C == 1 ? 1 : C == 2 ? 3 : ROWS;
  const size_t ahead = fetch && C == 1 && sizeof(T) == 1 ? 2 * w_stride : 0;
  int o = 0;
  if constexpr (R > 1)
    for (; o + R <= rows; o += R)
      block<R, C>(w + o * w_stride, w_stride, scales ? scales + o : scales, x, x_stride, n, y + o, y_stride, fetch ? 6 * w_stride : 0);
  for (; o < rows; ++o) block<1, C>(w + o * w_stride, w_stride, scales ? scales + o : scales, x, x_stride, n, y + o, y_stride, ahead);
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

#if SPARK_WIDTH == 8
constexpr auto LANES_OF = [] {  // each mask's lanes, side by side
  struct { uint8_t lanes[256][8]; } of{};
  for (int mask = 0; mask < 256; ++mask)
    for (int lane = 0, n = 0; lane < 8; ++lane)
      if (mask >> lane & 1) of.lanes[mask][n++] = lane;
  return of;
}();
#endif
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
    const __m256 v = _mm256_loadu_ps(s + i);
    const int mask = _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(theta), _CMP_GE_OQ));
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)LANES_OF.lanes[mask]));
    _mm256_storeu_ps(kept + count, _mm256_permutevar8x32_ps(v, order));
    _mm256_storeu_si256((__m256i*)(list + count), _mm256_add_epi32(order, _mm256_set1_epi32(i)));
    count += __builtin_popcount(mask);
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

// f(size, start) for groups of four, and then of one.
template <class F>
INLINE void by_fours(int n, F f) {
  int i = 0;
  for (; i + 4 <= n; i += 4) f(std::integral_constant<int, 4>{}, i);
  for (; i < n; ++i) f(std::integral_constant<int, 1>{}, i);
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

// What both ways of looking up some tokens begin with: arranged tokens, scores (tokens, F), and what is active.
template <class T>
struct Predicted {
  const FFN<T>& m;
  Scratch<float> x, scores, thresholds;

  Predicted(const FFN<T>& m, Pool& pool)
      : m(m), x(size_t(m.tokens) * m.d_model), scores(size_t(m.tokens) * m.d_ff), thresholds(m.tokens) {
    const int D = m.d_model, F = m.d_ff, r = m.r;
    parallel(pool, m.tokens, [&](int t) {
      arrange<T>(m.x + size_t(t) * D, r, x + size_t(t) * D);
      arrange<T>(m.x + size_t(t) * D + r, D - r, x + size_t(t) * D + r);
    }, size_t(m.tokens) * D);
    ranges(pool, F, 64, [&](int lo, int hi) {
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
  const T* record(size_t f) const { return m.records.values + f * (2 * m.d_model - m.r); }
  float scale(size_t f) const { return m.records.scales ? m.records.scales[2 * f] * m.records.scales[2 * f + 1] : 1.0f; }
  // GELU of what n scores of a token are above its threshold, in place.
  void activate(int t, float* s, int n) const {
    if (m.quantile != -INFINITY)
      for (int i = 0; i < n; ++i) {
        s[i] -= thresholds[t];
        if (m.huber > 0) s[i] = s[i] < m.huber ? s[i] * s[i] / (2 * m.huber) : s[i] - m.huber / 2;
      }
    each(s, n, [](Float x) { return gelu(x); });
  }
};

// Up to FEW tokens: record by record, each one run of memory, while the one after the next is on its way.
constexpr int FEW = 4;

template <class T>
void look_up_few(const FFN<T>& m, Pool& pool) {
  const int D = m.d_model, F = m.d_ff, r = m.r, rest = D - r, tokens = m.tokens;
  const Predicted<T> of(m, pool);
  // Each piece adds up its own y, so that sums do not depend on who runs what.
  const int pieces = least(F, pool.threads() * 4);
  Scratch<float> sums(size_t(pieces) * tokens * D);
  parallel(pool, pieces, [&](int piece) {
    const int lo = int64_t(F) * piece / pieces, hi = int64_t(F) * (piece + 1) / pieces, all = hi - lo;
    float* y = sums + size_t(piece) * tokens * D;
    std::memset(y, 0, sizeof(float) * tokens * D);
    Scratch<uint8_t> who(all);  // the bits of a neuron say whom it is active for
    Scratch<int> list(all + 1);
    Scratch<float> weights(size_t(tokens) * all);
    std::memset(who, 0, all);
    for (int t = 0; t < tokens; ++t) {
      const float *s = of.of(t) + lo, theta = of.thresholds[t];
      for (int f = 0; f < all; ++f) who[f] |= (s[f] > theta) << t;
    }
    int n = 0;
    for (int f = 0; f < all; ++f) {
      list[n] = f;
      n += who[f] != 0;
    }
    for (int t = 0; t < tokens; ++t) {
      for (int j = 0; j < n; ++j) weights[t * all + j] = of.of(t)[lo + list[j]];
      of.activate(t, weights + t * all, n);
    }
    auto record = [&](int j) { return of.record(lo + list[least(j, n - 1)]); };
    for (int j = 0; j < n; ++j) {
      const T* k2 = record(j);
      const ptrdiff_t ahead = record(j + 2) - k2;
      const float scale = of.scale(lo + list[j]);
      int token[FEW], sharing = 0;
      for (unsigned bits = who[list[j]]; bits; bits &= bits - 1) token[sharing++] = __builtin_ctz(bits);
      auto share = [&](auto size) {
        constexpr int C = decltype(size)::value;
        const float* q2[C];
        float *to[C], out[1][C];
        for (int c = 0; c < C; ++c) {
          q2[c] = of.x + size_t(token[c]) * D + r;
          to[c] = y + size_t(token[c]) * D;
        }
        dots<1, C, true>(&k2, q2, rest, out, ahead);
        for (int c = 0; c < C; ++c) out[0][c] *= weights[token[c] * all + j] * scale;
        spread<C, true>(k2 + rest, out[0], to, D, ahead);
      };
      if (sharing == 1) share(std::integral_constant<int, 1>{});
      if (sharing == 2) share(std::integral_constant<int, 2>{});
      if (sharing == 3) share(std::integral_constant<int, 3>{});
      if (sharing == 4) share(std::integral_constant<int, 4>{});
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

// More tokens: blocks of records in the second-level cache, token by token. First the dots with K2, block by block; then y, in which
// each task adds up columns of its own, so that they stay in its cache and sums do not depend on who runs what.
constexpr int BLOCK = W == 16 ? 128 : 96, LANES = 8, COLUMNS = LANES * W;

template <class T>
class Many {
 public:
  Many(const FFN<T>& m, Pool& pool)
      : m(m), of(m, pool), blocks((m.d_ff + BLOCK - 1) / BLOCK), room(size_t(BLOCK) * m.tokens + W), used(size_t(blocks) * BLOCK),
        starts(size_t(blocks) * (m.tokens + 1)), rows(blocks * room), weights(blocks * room) {
    parallel(pool, blocks, [&](int b) { choose(b); });
    const int pieces = least(blocks, 4 * pool.threads());
    parallel(pool, pieces, [&](int i) {
      for (int b = blocks * i / pieces, end = blocks * (i + 1) / pieces; b < end; ++b) dot(b, b + 1 < end);
    });
    const int tiles = (m.d_model + COLUMNS - 1) / COLUMNS, parts = least(tiles, pool.threads());
    parallel(pool, parts, [&](int i) { sum_up(tiles * i / parts * COLUMNS, least(m.d_model, tiles * (i + 1) / parts * COLUMNS)); });
  }

 private:
  const FFN<T>& m;
  const Predicted<T> of;
  const int blocks;
  const size_t room;       // for a block's entries: one per token and record that it activates, token by token
  Scratch<uint8_t> used;   // (blocks, BLOCK) is a record active for any token?
  Scratch<int> starts;     // (blocks, tokens + 1) of each token's entries
  Scratch<int> rows;       // (blocks, room) of an entry: the record in its block
  Scratch<float> weights;  // (blocks, room)

  void choose(int b) {
    const int lo = b * BLOCK, n = least(BLOCK, m.d_ff - lo);
    int *start = starts + size_t(b) * (m.tokens + 1), *row = rows + b * room;
    float* weight = weights + b * room;
    std::memset(used + lo, 0, BLOCK);
    start[0] = 0;
    for (int t = 0, p = 0; t < m.tokens; start[++t] = p) {
      const int found = compact(of.of(t) + lo, n, of.thresholds[t], row + p, weight + p);
      of.activate(t, weight + p, found);
      for (const int end = p + found; p < end; ++p) used[lo + row[p]] = 1;
    }
  }

  // Some columns of a token's share of a block's records, on their way to the second-level cache.
  INLINE void fetch(int b, int t, int begin, int columns) const {
    for (int i = BLOCK * t / m.tokens; i < BLOCK * (t + 1) / m.tokens; ++i)
      if (used[b * BLOCK + i]) {
        const char* from = reinterpret_cast<const char*>(of.record(size_t(b) * BLOCK + i) + begin);
        for (size_t byte = 0; byte < sizeof(T) * columns; byte += LINE) prefetch(from + byte);
      }
  }

  void dot(int b, bool more) {
    const int D = m.d_model, rest = D - m.r, *start = starts + size_t(b) * (m.tokens + 1), *row = rows + b * room;
    float* weight = weights + b * room;
    for (int t = 0; t < m.tokens; ++t) {
      if (more) fetch(b + 1, t, 0, rest);
      const float* q2 = of.x + size_t(t) * D + m.r;
      by_fours(start[t + 1] - start[t], [&](auto size, int i) {
        constexpr int R = decltype(size)::value;
        const T* k2[R];
        float out[R][1];
        const int p = start[t] + i;
        for (int c = 0; c < R; ++c) k2[c] = of.record(size_t(b) * BLOCK + row[p + c]);
        dots<R, 1>(k2, &q2, rest, out);
        for (int c = 0; c < R; ++c) weight[p + c] *= out[c][0] * of.scale(size_t(b) * BLOCK + row[p + c]);
      });
    }
  }

  void sum_up(int lo, int hi) {
    const int D = m.d_model, rest = D - m.r, width = hi - lo;
    Scratch<float> y(size_t(m.tokens) * width);
    std::memset(y, 0, sizeof(float) * m.tokens * width);
    for (int b = 0; b < blocks; ++b) {
      const int *start = starts + size_t(b) * (m.tokens + 1), *row = rows + b * room;
      const float* weight = weights + b * room;
      for (int begin = lo; begin < hi; begin += COLUMNS)
        for (int t = 0; t < m.tokens; ++t) {
          if (b + 1 < blocks) fetch(b + 1, t, rest + begin, least(COLUMNS, hi - begin));
          float* to = y + size_t(t) * width + (begin - lo);
          auto v = [&](int p) { return of.record(size_t(b) * BLOCK + row[p]) + rest + begin; };
          if (begin + COLUMNS <= hi) {
            Float acc[LANES];
#pragma GCC unroll 8
            for (int c = 0; c < LANES; ++c) acc[c] = load(to + c * W);
            for (int p = start[t]; p < start[t + 1]; ++p)
#pragma GCC unroll 8
              for (int c = 0; c < LANES; c += 2) {
                const Two b = two(v(p) + c * W);
                acc[c] += weight[p] * b.first;
                acc[c + 1] += weight[p] * b.second;
              }
#pragma GCC unroll 8
            for (int c = 0; c < LANES; ++c) store(to + c * W, acc[c]);
          } else {
            for (int p = start[t]; p < start[t + 1]; ++p) spread<1>(v(p), weight + p, &to, hi - begin);
          }
        }
    }
    for (int t = 0; t < m.tokens; ++t) restore<T>(y + size_t(t) * width, width, m.y + size_t(t) * D + lo);
  }
};

template <class T>
void ffn(const FFN<T>& m, Pool& pool) {
  for (int t = 0; t < m.tokens; t += 64) {
    FFN<T> part = m;
    part.tokens = least(64, m.tokens - t);
    part.x += size_t(t) * m.d_model;
    part.y += size_t(t) * m.d_model;
    part.active += t;
    if (part.tokens <= FEW)
      look_up_few(part, pool);
    else
      Many<T>(part, pool);
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
        by_fours(count, [&](auto size, int j) {
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
            for (int c = 0; c < C; c += 2) {
              const Two b = two(v + c * W);
              acc[c] += weights[j] * b.first;
              acc[c + 1] += weights[j] * b.second;
            }
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
        by_fours(n, [&](auto size, int i) {
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
