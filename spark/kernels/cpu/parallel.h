// Loops over a pool's threads, and temporary memory.
#pragma once

#include "vec.h"

namespace spark::SPARK_SET {
namespace {

template <class T>
class Scratch {
 public:
  explicit Scratch(size_t n) : p_(static_cast<T*>(allocate_scratch(n * sizeof(T)))) {}
  ~Scratch() { free_scratch(p_); }
  Scratch(const Scratch&) = delete;
  operator T*() const { return p_; }

 private:
  T* p_;
};

// f(i) for i in [0, n). The calling thread runs it alone if `work`, the number of floats that f touches in all, is too small to share.
template <class F>
void parallel(Pool& pool, int n, F f, size_t work = 1 << 20) {
  if (work < 1 << 16)
    for (int i = 0; i < n; ++i) f(i);
  else
    pool.run(n, [](void* context, int i) { (*static_cast<F*>(context))(i); }, &f);
}

// f(begin, end) for pieces of [0, n): about four per thread, and each of at least `smallest`.
template <class F>
void parallel_ranges(Pool& pool, int n, int smallest, F f) {
  int size = max(smallest, (n + 4 * pool.threads() - 1) / (4 * pool.threads()));
  size = (size + 11) / 12 * 12;  // a multiple of every block of rows in product.h
  parallel(pool, (n + size - 1) / size, [&](int i) { f(i * size, min(n, (i + 1) * size)); });
}

// f(size, start) for groups of four, then for single ones; `size` is a compile-time constant.
template <class F>
INLINE void groups_of_four(int n, F f) {
  int i = 0;
  for (; i + 4 <= n; i += 4) f(std::integral_constant<int, 4>{}, i);
  for (; i < n; ++i) f(std::integral_constant<int, 1>{}, i);
}

}  // namespace
}  // namespace spark::SPARK_SET
