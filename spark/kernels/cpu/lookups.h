// Both lookups of a Spark Transformer for decoding and prefill on CPUs: what each instruction set implements, and what they run on.
//
// bodies.h states the code once, on vectors of W floats; portable.cc, avx2.cc and avx512.cc compile it, each in a namespace and
// with instructions of its own. ffi.cc checks what comes from XLA and picks one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spark {

struct bf16 { uint16_t bits; };

// Threads to share a loop. Tasks are claimed in any order, so results must not depend on who runs which.
class Pool {
 public:
  virtual int threads() const = 0;
  virtual void run(int n, void (*task)(void* context, int i), void* context) = 0;  // task(context, i), 0 <= i < n; returns when done

 protected:
  ~Pool() = default;
};

// Memory for a while, given back in the opposite order; by cache lines. A thread keeps it for its next call: the system's own, which
// goes back and forth, has to be cleared every time, a tenth of what a prompt's FFN took.
void* take(size_t bytes);
void give_back(void* last);

// Rows of weights; scales has a float per row (or as stated), null unless T is int8_t.
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
// A record is a neuron's row of K2 and its row of V, side by side; its scales are two, (F, 2).
template <class T>
struct FFN {
  int tokens, d_model, d_ff, r;
  float quantile;  // theta = mean + std * quantile; -inf: every neuron is active, and nothing is subtracted
  float huber;
  const float* x;
  Rows<T> k1, records;
  float* y;
  int32_t* active;  // (tokens) neurons
};

// The keys and values of some tokens, (batch, heads, tokens, 2 * head_dim), go into a ring of `slots` tokens per head, place p in slot
// p % slots, and their queries, (batch, heads, group, tokens, head_dim), look up what is there.
// A record is a token's row of K2 and its row of V, (head_dim - r) + head_dim; for dense attention r is head_dim, and K2 empty.
template <class T>
struct Attention {
  int batch, heads, group, tokens, head_dim, r, slots;
  int k;            // 0: dense
  int window;       // 0: all
  float cap;        // soft-cap; 0: none
  int length;       // the first query's place
  const int32_t* first;    // (batch) the first place that holds a token of its row
  const float* quantiles;  // (slots + 1) of the normal distribution at 1 - k / n, for n visible keys
  const float *q, *fresh;
  T *keys, *records;
  float* y;
  int32_t* attended;  // (batch, heads, group, tokens) keys
};

// y = the sum of x
struct Read {
  int64_t n;
  const float* x;
  float* y;
};

#define SPARK_LOOKUPS(SET)                     \
  namespace SET {                              \
  void look_up(const Matmul<float>&, Pool&);   \
  void look_up(const Matmul<bf16>&, Pool&);    \
  void look_up(const Matmul<int8_t>&, Pool&);  \
  void look_up(const FFN<float>&, Pool&);      \
  void look_up(const FFN<bf16>&, Pool&);       \
  void look_up(const FFN<int8_t>&, Pool&);     \
  void look_up(const Attention<float>&, Pool&);\
  void look_up(const Attention<bf16>&, Pool&); \
  void look_up(const Read&, Pool&);            \
  }
SPARK_LOOKUPS(portable)
SPARK_LOOKUPS(avx2)
SPARK_LOOKUPS(avx512)

}  // namespace spark
