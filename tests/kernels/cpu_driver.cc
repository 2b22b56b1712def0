// Checks the CPU kernels against scalar loops in double precision, on random inputs and without JAX, so that it also runs on an
// emulated processor. Prints one line per instruction set; exits with 1 at the first mismatch. test_cpu.py compiles and runs it.
//
// Each case runs twice, with the tasks of every loop in opposite orders, and those of training for one and for three threads: the results
// must be bitwise the same.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(THREADS)
namespace spark {
void* allocate_scratch(size_t bytes) { return std::malloc(bytes ? bytes : 1); }
void free_scratch(void* latest) { std::free(latest); }
}  // namespace spark
#endif

namespace {
using namespace spark;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

#if defined(THREADS)  // real threads and the kernels' own scratch memory, for ThreadSanitizer
constexpr bool threaded = true;
struct TestPool final : Pool {
  const int threads_;
  TestPool(bool, int threads) : threads_(threads) {}
  int threads() const override { return threads_; }
  void run(int n, void (*task)(void*, int), void* context) override {
    std::atomic<int> next{0};
    std::vector<std::thread> others;
    for (int i = 0; i < threads_; ++i)
      others.emplace_back([&] {
        for (int k; (k = next++) < n;) task(context, k);
      });
    for (std::thread& other : others) other.join();
  }
};
#else
constexpr bool threaded = false;
struct TestPool final : Pool {
  const int threads_;
  bool backwards, flush;
  TestPool(bool backwards, int threads) : threads_(threads), backwards(backwards), flush(backwards) {}
  int threads() const override { return threads_; }
  void run(int n, void (*task)(void*, int), void* context) override {
#if defined(__x86_64__)  // as XLA's threads do and Python's do not, every other loop takes denormal numbers for zero
    const unsigned before = _mm_getcsr();
    flush = !flush;
    if (flush) _mm_setcsr(before | 0x8040);
#endif
    for (int i = 0; i < n; ++i) task(context, backwards ? n - 1 - i : i);
#if defined(__x86_64__)
    _mm_setcsr(before);
#endif
  }
};
#endif

std::mt19937 generator(0);
int uniform(int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(generator); }
Floats normal(size_t n, float std = 1) {
  Floats x(n);
  for (float& v : x) v = std::normal_distribution<float>(0, std)(generator);
  return x;
}

void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}
void close(const std::string& what, double found, double expected, double scale) {
  if (!(std::abs(found - expected) <= 1e-4 * scale + 1e-6))
    fail(what + ": " + std::to_string(found) + ", expected " + std::to_string(expected));
}

float widen(float x) { return x; }
float widen(int8_t x) { return x; }
float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
void narrow(float x, float* to) { *to = x; }
void narrow(float x, int8_t* to) { *to = int8_t(std::lrint(std::fmax(-127, std::fmin(127, x * 40)))); }
void narrow(float x, bf16* to) {  // the nearer of the two neighbours; the even one in a tie
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bf16 down{uint16_t(bits >> 16)}, up{uint16_t((bits >> 16) + 1)};
  const double below = std::abs(double(x) - widen(down)), above = std::abs(widen(up) - double(x));
  *to = below < above || (below == above && down.bits % 2 == 0) ? down : up;
}

// A random matrix; `exact` is what it stands for, with scales for each of `parts` column ranges [0, split) and [split, columns).
template <class T>
struct Matrix {
  std::vector<T> values;
  Floats scales;
  std::vector<double> exact;
  Matrix(int rows, int columns, int parts = 1, int split = 0) : values(size_t(rows) * columns), exact(values.size()) {
    const Floats x = normal(values.size()), s = normal(size_t(rows) * parts);
    if (std::is_same_v<T, int8_t>)
      for (float v : s) scales.push_back(0.02f + 0.005f * std::abs(v));
    for (size_t i = 0; i < values.size(); ++i) {
      narrow(x[i], &values[i]);
      const int part = parts == 2 && int(i % columns) >= split;
      exact[i] = widen(values[i]) * (scales.empty() ? 1.0 : double(scales[i / columns * parts + part]));
    }
  }
  Rows<T> rows() const { return {values.data(), scales.empty() ? nullptr : scales.data()}; }
};

template <class T>
double dot(const T* w, const float* x, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double(w[i]) * x[i];
  return sum;
}
double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double largest(const std::vector<double>& x) {
  double m = 0;
  for (double v : x) m = std::fmax(m, std::abs(v));
  return m;
}
void all_close(const std::string& what, const Floats& found, const Doubles& expected) {
  const double scale = largest(expected);
  for (size_t i = 0; i < found.size(); ++i) close(what, found[i], expected[i], scale);
}
double threshold(const std::vector<double>& s, double quantile) {
  double mean = 0, squares = 0;
  for (double v : s) mean += v / s.size();
  for (double v : s) squares += (v - mean) * (v - mean);
  return mean + quantile * std::sqrt(squares / std::fmax(1, double(s.size()) - 1));
}

template <class M>
void compute([[maybe_unused]] const std::string& set, const M& m, bool backwards, int threads = 3) {
  TestPool pool(backwards, threads);
#if defined(__x86_64__)
  if (set == "avx512") return avx512::compute(m, pool);
  if (set == "avx2") return avx2::compute(m, pool);
#endif
  portable::compute(m, pool);
}

template <class T>
void check_matmul(const std::string& set) {
  const int tokens = uniform(1, 20), in = uniform(1, 300), out = uniform(1, 90);
  const Floats x = normal(size_t(tokens) * in);
  const Matrix<T> w(out, in);
  Floats y(size_t(tokens) * out), again(y);
  compute(set, Matmul<T>{tokens, in, out, x.data(), w.rows(), y.data()}, false);
  compute(set, Matmul<T>{tokens, in, out, x.data(), w.rows(), again.data()}, true);
  if (y != again) fail("matmul depends on the order of tasks");
  for (int t = 0; t < tokens; ++t)
    for (int o = 0; o < out; ++o)
      close("matmul", y[t * out + o], dot(&w.exact[size_t(o) * in], &x[t * in], in), std::sqrt(in));
}

template <class T>
void check_ffn(const std::string& set, int tokens) {
  const int D = uniform(2, 300), F = uniform(2, 400), r = uniform(1, D - 1), R = 2 * D - r;
  const float quantile = Floats{-INFINITY, 0, 1, 1.5}[uniform(0, 3)], huber = uniform(0, 1) * 0.3f;
  const Floats x = normal(size_t(tokens) * D);
  const Matrix<T> k1(F, r), records(F, R, 2, D - r);
  Floats y(size_t(tokens) * D), again(y);
  std::vector<int32_t> active(tokens);
  int32_t read = -1;
  FFN<T> m{tokens, D, F, r, quantile, huber, x.data(), k1.rows(), records.rows(), y.data(), active.data(), &read};
  compute(set, m, false);
  m.y = again.data();
  compute(set, m, true);
  if (y != again) fail("ffn depends on the order of tasks");
  for (int t = 0; t < tokens; ++t) {
    std::vector<double> s(F), expected(D);
    int count = 0;
    for (int f = 0; f < F; ++f) s[f] = dot(&k1.exact[size_t(f) * r], &x[t * D], r);
    const double theta = threshold(s, quantile);
    for (int f = 0; f < F; ++f) {
      if (quantile != -INFINITY && !(s[f] > theta)) continue;
      double above = quantile == -INFINITY ? s[f] : s[f] - theta;
      if (huber > 0 && quantile != -INFINITY) above = above < huber ? above * above / (2 * huber) : above - huber / 2;
      const double* record = &records.exact[size_t(f) * R];
      const double weight = gelu(above) * dot(record, &x[t * D + r], D - r);
      for (int i = 0; i < D; ++i) expected[i] += weight * record[D - r + i];
      ++count;
    }
    close("ffn's active neurons", active[t], count, 1e4);  // a score within rounding of the threshold may go either way
    for (int i = 0; i < D; ++i) close("ffn", y[t * D + i], expected[i], largest(expected));
  }
}

template <class T>
void check_attention(const std::string& set, bool dense) {
  const int B = uniform(1, 2), N = uniform(1, 2), G = uniform(1, 5), L = uniform(1, 14), d = 2 * uniform(2, 130);
  const int r = dense ? d : uniform(1, d - 1), k = dense ? 0 : uniform(1, 20), window = uniform(0, 1) * uniform(1, 30);
  const int length = uniform(0, 100), reach = window ? std::fmin(window + L - 1, length + L) : length + L, S = reach + uniform(0, 7);
  const float cap = uniform(0, 1) * 5.0f;
  const int width = 2 * d - r, heads = B * N;
  const Floats q = normal(size_t(heads) * G * L * d, 1 / std::sqrt(float(d))), fresh = normal(size_t(heads) * L * 2 * d);
  const Matrix<T> old_keys(heads * S, r), old_records(heads * S, width);
  std::vector<int32_t> first(B), attended(size_t(heads) * G * L);
  for (int32_t& p : first) p = uniform(0, length);
  Floats quantiles(S + 1), y(q.size()), again(y);
  for (int i = 0; i <= S; ++i) quantiles[i] = i > k ? std::log(double(i) / k) / 2 : -INFINITY;
  std::vector<T> keys = old_keys.values, records = old_records.values;
  Attention<T> m{B, N, G, L, d, r, S, k, window, cap, length, first.data(), quantiles.data(), q.data(), fresh.data(),
                 keys.data(), records.data(), y.data(), attended.data()};
  compute(set, m, false);
  std::vector<T> keys_again = old_keys.values, records_again = old_records.values;
  m.keys = keys_again.data();
  m.records = records_again.data();
  m.y = again.data();
  compute(set, m, true);
  if (y != again) fail("attention depends on the order of tasks");
  std::vector<T> new_keys = old_keys.values, new_records = old_records.values;
  for (int h = 0; h < heads; ++h)
    for (int l = 0; l < L; ++l)
      for (int i = 0; i < 2 * d; ++i) {
        const size_t slot = size_t(h) * S + (length + l) % S;
        narrow(fresh[(size_t(h) * L + l) * 2 * d + i], i < r ? &new_keys[slot * r + i] : &new_records[slot * width + i - r]);
      }
  if (std::memcmp(keys.data(), new_keys.data(), keys.size() * sizeof(T)) ||
      std::memcmp(records.data(), new_records.data(), records.size() * sizeof(T)))
    fail("attention has written a wrong cache");
  int differ = 0;
  for (int i = 0; i < heads * G * L; ++i) {
    const int h = i / (G * L), position = length + i % L;
    const int from = std::fmin(position, std::fmax(first[h / N], window ? position - window + 1 : 0)), n = position - from + 1;
    auto row = [&](const std::vector<T>& table, int p, int columns) {
      const T* start = &table[(size_t(h) * S + (from + p) % S) * columns];
      std::vector<double> values(columns);
      for (int c = 0; c < columns; ++c) values[c] = widen(start[c]);
      return values;
    };
    std::vector<double> s(n), weights(n), expected(d);
    double top = -INFINITY, total = 0;
    for (int p = 0; p < n; ++p) top = std::fmax(top, s[p] = dot(row(new_keys, p, r).data(), &q[size_t(i) * d], r));
    const double theta = k && n > k ? std::fmin(threshold(s, quantiles[n]), top) : -INFINITY;
    auto softcap = [&](double x) { return cap ? cap * std::tanh(x / cap) : x; };
    int count = 0;
    for (int p = 0; p < n; ++p)
      if (s[p] >= theta) {
        total += weights[p] = std::exp(softcap(s[p]) - softcap(top));
        ++count;
      }
    if (count != attended[i]) {  // a score within rounding of the hard threshold may go either way
      differ += 1;
      continue;
    }
    for (int p = 0; p < n; ++p) {
      const std::vector<double> record = row(new_records, p, width);
      const double gate = k ? std::log1p(std::exp(dot(record.data(), &q[size_t(i) * d + r], d - r))) : 1;
      for (int c = 0; c < d; ++c) expected[c] += weights[p] / total * gate * record[d - r + c];
    }
    for (int c = 0; c < d; ++c) close("attention", y[size_t(i) * d + c], expected[c], largest(expected));
  }
  if (differ > 0.05 * heads * G * L + (dense ? 0 : 1)) fail("attention: the numbers of attended keys differ");
}

// The FFN for training, forward and backward, with theta held.
void check_ffn_training(const std::string& set) {
  const int T = uniform(1, 90), F = uniform(2, 1200), r = uniform(1, 70), w = uniform(0, 300), D = uniform(1, 200), ddof = uniform(0, 1);
  const float quantile = Floats{0, 1, 1.5}[uniform(0, 2)], huber = uniform(0, 1) * 0.3f;
  Floats s = normal(size_t(T) * F);
  for (int i = 0; i < F; ++i) s[i] = 0;  // equal scores, of which none lies above their mean
  const Floats x1 = normal(size_t(T) * r), x2 = normal(size_t(T) * w), k1 = normal(size_t(r) * F);
  const Floats k2 = normal(size_t(w) * F), v = normal(size_t(F) * D), dy = normal(size_t(T) * D);
  struct Results {
    Floats y, statistics, ds, dx1, dx2, dk1, dk2, dv, slopes;
    std::vector<int32_t> active;
  } found[3];
  for (int i = 0; i < 3; ++i) {  // once forward, once backward through the tasks, and with all of ds
    Results& f = found[i];
    f = {Floats(size_t(T) * D), Floats(3 * T), s, Floats(x1.size()), Floats(x2.size()), Floats(k1.size()), Floats(k2.size()),
         Floats(v.size()), Floats(2 * T), std::vector<int32_t>(T)};
    compute(set, FFNForward{T, F, w, D, quantile, huber, ddof, s.data(), x2.data(), k2.data(), v.data(), f.y.data(), f.statistics.data(),
                            f.active.data()}, i % 2, 1 + 2 * (i % 2));
    compute(set, FFNBackward{T, F, r, w, D, quantile, huber, ddof, f.ds.data(), f.statistics.data(), x1.data(), x2.data(), dy.data(),
                             k1.data(), k2.data(), v.data(), i == 2 ? f.ds.data() : nullptr, f.dx1.data(), f.dx2.data(), f.dk1.data(),
                             f.dk2.data(), f.dv.data(), f.slopes.data()}, i % 2, 1 + 2 * (i % 2));
  }
  const Results& f = found[0];
  if (f.y != found[1].y || f.dx1 != found[1].dx1 || f.dx2 != found[1].dx2 || f.dk1 != found[1].dk1 || f.dk2 != found[1].dk2 ||
      f.dv != found[1].dv || f.slopes != found[1].slopes)
    fail("ffn_training depends on the order of tasks");
  if (f.dx2 != found[2].dx2 || f.dk2 != found[2].dk2 || f.dv != found[2].dv || f.slopes != found[2].slopes)
    fail("ffn_training depends on whether all of ds is wanted");
  Doubles y(f.y.size()), ds(s.size()), dx1(x1.size()), dx2(x2.size()), dk1(k1.size()), dk2(k2.size()), dv(v.size()), slopes(2 * T);
  for (int t = 0; t < T; ++t) {
    double mean = 0, squares = 0;
    for (int i = 0; i < F; ++i) mean += s[size_t(t) * F + i] / double(F);
    for (int i = 0; i < F; ++i) squares += std::pow(s[size_t(t) * F + i] - mean, 2);
    const double std = std::sqrt(squares / std::fmax(1, F - ddof));
    close("theta", f.statistics[3 * t], mean + quantile * std, 1);
    double dtheta = 0;
    int count = 0;
    for (int n = 0; n < F; ++n) {
      const float score = s[size_t(t) * F + n], theta = f.statistics[3 * t];
      if (!(score > theta)) continue;
      ++count;
      double m = double(score) - theta, s2 = w ? 0 : 1, u = 0;
      const double slope = huber > 0 && m < huber ? m / huber : 1, step = 1e-4;
      if (huber > 0) m = m < huber ? m * m / (2 * huber) : m - huber / 2;
      for (int i = 0; i < w; ++i) s2 += double(x2[t * w + i]) * k2[size_t(i) * F + n];
      for (int i = 0; i < D; ++i) u += double(dy[t * D + i]) * v[size_t(n) * D + i];
      const double a = gelu(m), dm = u * s2 * slope * (gelu(m + step) - gelu(m - step)) / (2 * step);
      dtheta -= dm;
      ds[size_t(t) * F + n] = dm;
      for (int i = 0; i < D; ++i) {
        y[t * D + i] += a * s2 * v[size_t(n) * D + i];
        dv[size_t(n) * D + i] += a * s2 * dy[t * D + i];
      }
      for (int i = 0; i < r; ++i) {
        dx1[t * r + i] += dm * k1[size_t(i) * F + n];
        dk1[size_t(n) * r + i] += dm * x1[t * r + i];
      }
      for (int i = 0; i < w; ++i) {
        dx2[t * w + i] += u * a * k2[size_t(i) * F + n];
        dk2[size_t(i) * F + n] += u * a * x2[t * w + i];
      }
    }
    close("active neurons", f.active[t], count, 0);
    const double beta = std > 1e-6 ? dtheta * quantile / (std::fmax(1, F - ddof) * std) : 0, alpha = dtheta / F - beta * mean;
    slopes[2 * t] = alpha;
    slopes[2 * t + 1] = beta;
    for (int n = 0; n < F; ++n) ds[size_t(t) * F + n] += alpha + beta * s[size_t(t) * F + n];
  }
  all_close("ffn_training's y", f.y, y);
  all_close("dx1", f.dx1, dx1);
  all_close("dx2", f.dx2, dx2);
  all_close("dk1", f.dk1, dk1);
  all_close("dk2", f.dk2, dk2);
  all_close("dv", f.dv, dv);
  all_close("slopes", f.slopes, slopes);
  all_close("ds", found[2].ds, ds);
}

// Attention for training, forward and backward, with the survivors that its own thresholds pick.
void check_attention_training(const std::string& set) {
  const int B = uniform(1, 2), N = uniform(1, 3), G = uniform(1, 3), L = uniform(0, 2) ? uniform(1, 90) : 600, d = uniform(2, 150);
  const int r = uniform(1, d - 1), keep = uniform(1, 30), window = uniform(0, 1) * uniform(1, 60), heads = B * N;
  const float cap = uniform(0, 1) * 5.0f;
  const Floats q = normal(size_t(heads) * G * L * d, 1 / std::sqrt(float(d))), k = normal(size_t(heads) * L * d), v = normal(k.size());
  const Floats dy = normal(q.size());
  std::vector<int32_t> starts(size_t(B) * L);
  for (int i = 0; i < B * L; ++i) {
    const int l = i % L, document = l && uniform(0, 30) ? starts[i - 1] : l;
    starts[i] = std::fmax(document, window ? l - window + 1 : 0);
  }
  Floats quantiles(L + 1);
  for (int i = 0; i <= L; ++i) quantiles[i] = i > keep ? std::log(double(i) / keep) / 2 : -INFINITY;
  struct Results { Floats y, thetas, log_z, attended, dq, dk, dv; } found[2];
  for (int i = 0; i < 2; ++i) {
    Results& f = found[i];
    const size_t queries = q.size() / d;
    f = {Floats(q.size()), Floats(queries), Floats(queries), Floats(queries), Floats(q.size()), Floats(k.size()), Floats(k.size())};
    const AttentionInputs in{B, N, G, L, d, r, cap, starts.data(), q.data(), k.data(), v.data()};
    compute(set, AttentionForward{in, keep, quantiles.data(), f.y.data(), f.thetas.data(), f.log_z.data(), f.attended.data()}, i, 1 + 2 * i);
    compute(set, AttentionBackward{in, f.thetas.data(), f.log_z.data(), f.y.data(), dy.data(), f.dq.data(), f.dk.data(), f.dv.data()}, i,
            1 + 2 * i);
  }
  const Results& f = found[0];
  if (f.y != found[1].y || f.dq != found[1].dq || f.dk != found[1].dk || f.dv != found[1].dv)
    fail("attention_training depends on the order of tasks");
  Doubles y(q.size()), dq(q.size()), dk(k.size()), dv(k.size());
  for (int i = 0; i < heads * G * L; ++i) {
    const int head = i / (G * L), l = i % L, lo = starts[head / N * L + l], n = l + 1 - lo;
    const size_t first = (size_t(head) * L + lo) * d;
    const float *query = &q[size_t(i) * d], *gradient = &dy[size_t(i) * d];
    Doubles s(n), weight(n), gate(n), slope(n), u(n);
    double top = -INFINITY, total = 0, delta = 0;
    for (int j = 0; j < n; ++j) top = std::fmax(top, s[j] = dot(query, &k[first + j * d], r));
    const double theta = n > keep ? std::fmin(threshold(s, quantiles[n]), top) : -INFINITY;
    if (n > keep) close("the threshold of a query", f.thetas[i], theta, 1);
    int count = 0;
    std::vector<bool> kept(n);
    double nearest = INFINITY;
    for (int j = 0; j < n; ++j) {
      kept[j] = s[j] >= theta;
      if (theta < top) nearest = std::fmin(nearest, std::abs(s[j] - theta));
      count += kept[j];
    }
    // A score within rounding of the threshold may go either way: then take what the kernel took, the nearest one.
    if (count != int(f.attended[i])) {
      if (nearest > 1e-5 || std::abs(count - f.attended[i]) > 1) fail("attention_training: the numbers of attended keys differ");
      for (int j = 0; j < n; ++j)
        if (std::abs(s[j] - theta) == nearest) kept[j] = !kept[j];
    }
    auto logit = [&](int j) { return cap ? cap * std::tanh(s[j] / cap) : s[j]; };
    for (int j = 0; j < n; ++j)
      if (kept[j]) total += std::exp(logit(j));
    close("log Z", f.log_z[i], std::log(total), 1);
    for (int j = 0; j < n; ++j) {
      if (!kept[j]) continue;
      const float *key = &k[first + size_t(j) * d], *value = &v[first + size_t(j) * d];
      const double s2 = dot(query + r, key + r, d - r);
      weight[j] = std::exp(logit(j)) / total;
      gate[j] = std::log1p(std::exp(s2));
      slope[j] = 1 / (1 + std::exp(-s2));
      u[j] = dot(gradient, value, d);
      delta += weight[j] * gate[j] * u[j];
      for (int c = 0; c < d; ++c) {
        y[size_t(i) * d + c] += weight[j] * gate[j] * value[c];
        dv[first + size_t(j) * d + c] += weight[j] * gate[j] * gradient[c];
      }
    }
    for (int j = 0; j < n; ++j) {
      if (!kept[j]) continue;
      const double ds = weight[j] * (gate[j] * u[j] - delta) * (cap ? 1 - std::pow(logit(j) / cap, 2) : 1);
      const double ds2 = weight[j] * u[j] * slope[j];
      for (int c = 0; c < d; ++c) {
        dq[size_t(i) * d + c] += (c < r ? ds : ds2) * k[first + size_t(j) * d + c];
        dk[first + size_t(j) * d + c] += (c < r ? ds : ds2) * query[c];
      }
    }
  }
  all_close("attention_training's y", f.y, y);
  all_close("dq", f.dq, dq);
  all_close("dk", f.dk, dk);
  all_close("dv of attention", f.dv, dv);
}

void check_add_transposed(const std::string& set) {
  const int rows = uniform(1, 200), columns = uniform(1, 300);
  const Floats x = normal(size_t(rows) * columns), bias = normal(columns), before = normal(x.size());
  Floats y = before;
  compute(set, AddTransposed{rows, columns, x.data(), bias.data(), y.data()}, false);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j)
      close("add_transposed", y[size_t(j) * rows + i], double(before[size_t(j) * rows + i]) + x[size_t(i) * columns + j] + bias[j], 1);
}

void check_read(const std::string& set) {
  const Floats x = normal(uniform(1, 200000));
  double expected = 0;
  for (float v : x) expected += v;
  float y;
  compute(set, Read{int64_t(x.size()), x.data(), &y}, false);
  close("read", y, expected, std::sqrt(x.size()));
}

template <class T>
void check_type(const std::string& set) {
  for (int i = 0; i < 10; ++i) check_matmul<T>(set);
  for (int tokens : {1, 2, 3, 4, 5, 17, 64, 67}) check_ffn<T>(set, tokens);
  if constexpr (!std::is_same_v<T, int8_t>)
    for (int i = 0; i < 20; ++i) check_attention<T>(set, i % 2);
}
}  // namespace

int main() {
  std::vector<std::string> sets = {"portable"};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    sets.push_back("avx512");
#endif
  for (const std::string& set : sets) {
    generator.seed(0);  // the same inputs for each
    if (!threaded) {
      check_type<float>(set);
      check_type<bf16>(set);
      check_type<int8_t>(set);
    }
    for (int i = 0; i < (threaded ? 3 : 10); ++i) check_ffn_training(set);
    for (int i = 0; i < (threaded ? 5 : 15); ++i) check_attention_training(set);
    for (int i = 0; i < 5; ++i) check_add_transposed(set);
    check_read(set);
    std::printf("%s: ok\n", set.c_str());
  }
}
