// The interface of the CPU kernels: both lookups of a Spark Transformer, for decoding and prefill, and for training.
//
// The other headers state the code once, on vectors of SPARK_WIDTH floats. portable.cc, avx2.cc and
// avx512.cc compile it, each for its own instruction set and in its own namespace. ffi.cc and ffi_training.cc check XLA's buffers and
// pick a set.
//
// GCC 12 and clang 14 build it without warnings. On 64-bit ARM it was tested under emulation (qemu), as built by either compiler, by
// tests/kernels/cpu_driver.cc, which found no difference; its speed there is unknown.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spark {

struct bf16 { uint16_t bits; };

// Threads that share a loop. Any thread may run any task, so a result must not depend on which thread runs which task.
class Pool {
 public:
  virtual int threads() const = 0;
  virtual void run(int n, void (*task)(void* context, int i), void* context) = 0;  // task(context, i), 0 <= i < n; returns when done

 protected:
  ~Pool() = default;
};

// Temporary memory, aligned to cache lines, freed in the opposite order of allocation. Buffers are kept for the next call: memory fresh
// from the operating system has to be cleared first, which took a tenth of a prompt's FFN.
void* allocate_scratch(size_t bytes);
void free_scratch(void* latest);

// Rows of weights; scales holds one float per row (unless stated otherwise) if T is int8_t, and is null for other types.
template <class T>
struct Rows {
  const T* values;
  const float* scales;
};

// y[t, o] = x[t, :] . W[o, :]
template <class T>
struct Matmul {
  int tokens, in, out;
  const float* x;
  Rows<T> w;
  float* y;
};

// y[t] = sum over neurons f with s = K1[f] . x[t, :r] > theta_t of GELU(s - theta_t) (K2[f] . x[t, r:]) V[f]
// A record is a neuron's row of K2 followed by its row of V; it has two scales, (d_ff, 2).
template <class T>
struct FFN {
  int tokens, d_model, d_ff, r;
  float quantile;  // theta = mean + std * quantile; -inf: every neuron is active, and nothing is subtracted
  float huber;     // width of the Huber-smoothed soft threshold; 0: none
  const float* x;
  Rows<T> k1, records;
  float* y;
  int32_t* active;  // (tokens) active neurons
  int32_t* read;    // how many records were read: one that several tokens of a chunk use counts once
};

// First, the new keys and values, (batch, heads, tokens, 2 * head_dim), are written to the cache: a ring buffer of `slots` tokens per
// head, where position p lies in slot p % slots. Then the queries, (batch, heads, group, tokens, head_dim), attend to the cache.
// A record is a token's row of K2 followed by its row of V, (head_dim - r) + head_dim. In dense attention r = head_dim: no K2.
template <class T>
struct Attention {
  int batch, heads, group, tokens, head_dim, r, slots;
  int k;            // 0: dense attention
  int window;       // 0: no window
  float cap;        // soft-cap of the scores; 0: none
  int length;       // position of the first query
  const int32_t* first;    // (batch) first position that holds a token of the row
  const float* quantiles;  // (slots + 1) quantile of the normal distribution at 1 - k / n, for n visible keys
  const float *q, *fresh;  // queries; new keys and values
  T *keys, *records;
  float* y;
  int32_t* attended;  // (batch, heads, group, tokens) attended keys
};

// The FFN with top-k for training, from its scores x1 . K1 (tokens, d_ff):
// y[t] = sum over f with scores[t, f] > theta_t of GELU(scores[t, f] - theta_t) (x2[t] . k2[:, f]) v[f]
// Without a gate width is 0, and the second score is 1.
struct FFNForward {
  int tokens, d_ff, width, d_model;  // x2 (tokens, width), k2 (width, d_ff), v (d_ff, d_model)
  float quantile, huber;             // as in FFN, but quantile is finite
  int ddof;                          // the variance is a sum of squares over d_ff - ddof
  const float *scores, *x2, *k2, *v;
  float *y, *statistics;  // statistics (tokens, 3): theta, mean and standard deviation of the scores
  int32_t* active;
};

// Its gradients. The scores' is ds, in place of the scores, or if that is null dm, which has the active neurons only, and per token alpha
// and beta (tokens, 2) of ds = dm + alpha + beta s; then dx1 and dk1 (d_ff, r), transposed, are those of dm.
struct FFNBackward {
  int tokens, d_ff, r, width, d_model;  // x1 (tokens, r), k1 (r, d_ff)
  float quantile, huber;
  int ddof;
  const float *scores, *statistics, *x1, *x2, *dy, *k1, *k2, *v;
  float *ds, *dx1, *dx2, *dk1, *dk2, *dv, *slopes;
};

// Spark attention for training. Each of `heads` key-value heads serves `group` heads of queries.
struct AttentionInputs {
  int batch, heads, group, length, head_dim, r;
  float cap;              // soft-cap of the scores; 0: none
  const int32_t* starts;  // (batch, length) the first key that each query sees; does not decrease within a row
  const float *q, *k, *v;  // q (batch, heads, group, length, head_dim); k and v (batch, heads, length, head_dim)
};
struct AttentionForward {
  AttentionInputs in;
  int keep;                // keys kept per query, approximately
  const float* quantiles;  // (length + 1), as in Attention
  float *y, *thetas, *log_z, *attended;  // y as q; the others (batch, heads, group, length)
};
struct AttentionBackward {
  AttentionInputs in;
  const float *thetas, *log_z, *y, *dy;
  float *dq, *dk, *dv;
};

// y[j, i] += x[i, j] + bias[j], x (rows, columns)
struct AddTransposed {
  int rows, columns;
  const float *x, *bias;
  float* y;
};

// y = the sum of x, which is the fastest way to read memory
struct Read {
  int64_t n;
  const float* x;
  float* y;
};

#define SPARK_ENTRY_POINTS(SET)                \
  namespace SET {                              \
  void compute(const Matmul<float>&, Pool&);   \
  void compute(const Matmul<bf16>&, Pool&);    \
  void compute(const Matmul<int8_t>&, Pool&);  \
  void compute(const FFN<float>&, Pool&);      \
  void compute(const FFN<bf16>&, Pool&);       \
  void compute(const FFN<int8_t>&, Pool&);     \
  void compute(const Attention<float>&, Pool&);\
  void compute(const Attention<bf16>&, Pool&); \
  void compute(const FFNForward&, Pool&);      \
  void compute(const FFNBackward&, Pool&);     \
  void compute(const AttentionForward&, Pool&);\
  void compute(const AttentionBackward&, Pool&);\
  void compute(const AddTransposed&, Pool&);   \
  void compute(const Read&, Pool&);            \
  }
SPARK_ENTRY_POINTS(portable)
SPARK_ENTRY_POINTS(avx2)
SPARK_ENTRY_POINTS(avx512)
#undef SPARK_ENTRY_POINTS

}  // namespace spark
