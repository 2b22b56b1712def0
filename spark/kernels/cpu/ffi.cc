// The kernels as custom calls of XLA: checks shapes, picks the instruction set, and runs on XLA's own threads, so that no second pool
// of threads competes with it.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace spark {
namespace {

// Runs the loops of one call on XLA's threads. Waking a thread takes as long as reading a megabyte, so helpers are scheduled once per
// call and spin between its loops. The calling thread works too, and waits for tasks to be done, not for helpers to start. So a helper
// that XLA starts late finds nothing to do, and a busy thread pool cannot cause a deadlock.
class XlaPool final : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool), threads_(std::max<int64_t>(1, pool.num_threads())) {}
  ~XlaPool() {
    if (state_) state_->closed = true;
  }

  int threads() const override { return threads_; }

  void run(int n, void (*task)(void*, int), void* context) override {
    const int helpers = std::min(threads_, n) - 1;
    if (helpers <= 0) {
      for (int i = 0; i < n; ++i) task(context, i);
      return;
    }
    if (!state_) state_ = std::make_shared<State>();
    State& state = *state_;
    state.task = task;
    state.context = context;
    state.n = n;
    state.next = state.done = 0;
    state.loop = ++loops_;  // opens the loop to helpers
    for (; scheduled_ < helpers; ++scheduled_) pool_.Schedule([shared = state_] { shared->help(); });
    state.work();
    wait([&] { return state.done == n; });
    state.loop = 0;
    wait([&] { return state.inside == 0; });  // no helper may still read this loop's task
  }

 private:
  template <class F>
  static void wait(F ready) {
    for (int spins = 0; !ready(); ++spins)
      if (spins > 2000) std::this_thread::yield();
  }

  struct State {
    std::atomic<bool> closed{false};
    std::atomic<int> loop{0};  // number of the open loop; 0: none
    std::atomic<int> inside{0}, next{0}, done{0};  // helpers in the loop; next task; tasks that are done
    void (*task)(void*, int) = nullptr;
    void* context = nullptr;
    int n = 0;

    void work() {
      for (int i; (i = next++) < n; ++done) task(context, i);
    }
    void help() {
      for (int last = 0; !closed;) {
        wait([&] { return closed || (loop && loop != last); });
        ++inside;
        if (const int now = loop) {
          work();
          last = now;
        }
        --inside;
      }
    }
  };

  ffi::ThreadPool pool_;
  int threads_, scheduled_ = 0, loops_ = 0;
  std::shared_ptr<State> state_;
};

// A thread's stack of scratch buffers: the first `depth` are in use, the others are kept for reuse.
struct ScratchStack {
  struct Buffer { void* address; size_t bytes; };
  std::vector<Buffer> buffers;
  size_t depth = 0;
  ~ScratchStack() {
    for (Buffer& b : buffers) std::free(b.address);
  }
};
thread_local ScratchStack scratch;

enum InstructionSet { kBest = 0, kPortable = 1, kAvx2 = 2, kAvx512 = 3 };

InstructionSet best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

template <class M>
void compute(InstructionSet set, const M& m, Pool& pool) {
#if defined(__x86_64__)
  if (set == kAvx512) return avx512::compute(m, pool);
  if (set == kAvx2) return avx2::compute(m, pool);
#endif
  return portable::compute(m, pool);
}

ffi::ErrorOr<InstructionSet> resolve(int64_t set) {
  static const InstructionSet supported = best();
  if (set > supported) return ffi::Unexpected(ffi::Error::InvalidArgument("this processor does not support the requested instruction set"));
  return set == kBest ? supported : static_cast<InstructionSet>(set);
}

using Dims = ffi::AnyBuffer::Dimensions;

std::string text(Dims dims) {
  std::string s = "(";
  for (size_t i = 0; i < dims.size(); ++i) s += (i ? ", " : "") + std::to_string(dims[i]);
  return s + ")";
}

template <class B>
ffi::Error wrong_shape(const char* name, B got, const std::string& want) {
  return ffi::Error::InvalidArgument(std::string(name) + " has shape " + text(got.dimensions()) + ": want " + want);
}

template <class B>
bool has_shape(B b, std::initializer_list<int64_t> shape) {
  Dims dims = b.dimensions();
  return dims.size() == shape.size() && std::equal(dims.begin(), dims.end(), shape.begin());
}

#define REQUIRE_SHAPE(BUFFER, ...) \
  if (!has_shape(BUFFER, {__VA_ARGS__})) return wrong_shape(#BUFFER, BUFFER, #__VA_ARGS__)

// f(a value of the weights' element type)
template <class F>
ffi::Error dispatch_type(ffi::AnyBuffer w, F f) {
  switch (w.element_type()) {
    case ffi::DataType::F32: return f(float{});
    case ffi::DataType::BF16: return f(bf16{});
    case ffi::DataType::S8: return f(int8_t{});
    default: return ffi::Error::InvalidArgument("weights: want float32, bfloat16 or int8");
  }
}

template <class T>
Rows<T> rows(ffi::AnyBuffer values, ffi::Buffer<ffi::F32> scales) {
  return {static_cast<const T*>(values.untyped_data()), std::is_same_v<T, int8_t> ? scales.typed_data() : nullptr};
}

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

ffi::Error MatmulImpl(ffi::ThreadPool threads, int64_t set, Floats x, ffi::AnyBuffer w, Floats scales, ffi::Result<Floats> y) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (x.dimensions().size() != 2 || w.dimensions().size() != 2) return wrong_shape("w", w, "two axes, as x");
  const int64_t tokens = x.dimensions()[0], in = x.dimensions()[1], out = w.dimensions()[0];
  REQUIRE_SHAPE(w, out, in);
  REQUIRE_SHAPE(*y, tokens, out);
  return dispatch_type(w, [&](auto type) {
    using T = decltype(type);
    if (std::is_same_v<T, int8_t> && !has_shape(scales, {out})) return wrong_shape("scales", scales, "a float per row of int8 weights");
    XlaPool pool(threads);
    Matmul<T> m{int(tokens), int(in), int(out), x.typed_data(), rows<T>(w, scales), y->typed_data()};
    compute(*use, m, pool);
    return ffi::Error::Success();
  });
}

ffi::Error FFNImpl(ffi::ThreadPool threads, int64_t set, float quantile, float huber, Floats x, ffi::AnyBuffer k1, Floats k1_scales,
                   ffi::AnyBuffer records, Floats record_scales, ffi::Result<Floats> y, ffi::Result<Ints> active) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (x.dimensions().size() != 2 || k1.dimensions().size() != 2) return wrong_shape("k1", k1, "two axes, as x");
  const int64_t tokens = x.dimensions()[0], D = x.dimensions()[1], neurons = k1.dimensions()[0], r = k1.dimensions()[1];
  REQUIRE_SHAPE(records, neurons, 2 * D - r);
  REQUIRE_SHAPE(*y, tokens, D);
  REQUIRE_SHAPE(*active, tokens);
  if (records.element_type() != k1.element_type()) return ffi::Error::InvalidArgument("k1 and records: want one dtype");
  return dispatch_type(k1, [&](auto type) {
    using T = decltype(type);
    if (std::is_same_v<T, int8_t> && !(has_shape(k1_scales, {neurons}) && has_shape(record_scales, {neurons, 2})))
      return wrong_shape("record_scales", record_scales, "(neurons, 2), and (neurons) for k1, of int8 weights");
    XlaPool pool(threads);
    FFN<T> m{int(tokens), int(D), int(neurons), int(r), quantile, huber, x.typed_data(), rows<T>(k1, k1_scales),
             rows<T>(records, record_scales), y->typed_data(), active->typed_data()};
    compute(*use, m, pool);
    return ffi::Error::Success();
  });
}

ffi::Error AttentionImpl(ffi::ThreadPool threads, int64_t set, int64_t k, int64_t window, float cap, Floats q, Floats fresh,
                         ffi::AnyBuffer keys, ffi::AnyBuffer records, Ints first, Ints length, Floats quantiles, ffi::Result<Floats> y,
                         ffi::Result<Ints> attended, ffi::Result<ffi::AnyBuffer> new_keys, ffi::Result<ffi::AnyBuffer> new_records) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (q.dimensions().size() != 5) return wrong_shape("q", q, "(batch, heads, group, tokens, head_dim)");
  if (keys.dimensions().size() != 4) return wrong_shape("keys", keys, "(batch, heads, slots, r)");
  Dims s = q.dimensions();
  const int64_t B = s[0], N = s[1], G = s[2], L = s[3], d = s[4], slots = keys.dimensions()[2], r = keys.dimensions()[3];
  REQUIRE_SHAPE(fresh, B, N, L, 2 * d);
  REQUIRE_SHAPE(keys, B, N, slots, r);
  REQUIRE_SHAPE(records, B, N, slots, 2 * d - r);
  REQUIRE_SHAPE(first, B);
  REQUIRE_SHAPE(length);
  REQUIRE_SHAPE(*y, B, N, G, L, d);
  REQUIRE_SHAPE(*attended, B, N, G, L);
  if (k) REQUIRE_SHAPE(quantiles, slots + 1);
  if (r > d || (!k && r != d)) return wrong_shape("keys", keys, "r below head_dim for a top-k, or r = head_dim for dense attention");
  const int64_t before = length.typed_data()[0], after = before + L, visible = window ? std::min(window + L - 1, after) : after;
  if (before < 0 || visible > slots) return wrong_shape("keys", keys, "a slot for every position that the queries see");
  if (records.element_type() != keys.element_type()) return ffi::Error::InvalidArgument("keys and records: want one dtype");
  if (new_keys->untyped_data() != keys.untyped_data() || new_records->untyped_data() != records.untyped_data())
    return ffi::Error::Internal("the cache was not updated in place");
  return dispatch_type(keys, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, int8_t>) {
      return ffi::Error::InvalidArgument("keys: want float32 or bfloat16");
    } else {
      XlaPool pool(threads);
      Attention<T> m{int(B), int(N), int(G), int(L), int(d), int(r), int(slots), int(k), int(window), cap, int(before),
                     first.typed_data(), quantiles.typed_data(), q.typed_data(), fresh.typed_data(),
                     static_cast<T*>(new_keys->untyped_data()), static_cast<T*>(new_records->untyped_data()), y->typed_data(),
                     attended->typed_data()};
      compute(*use, m, pool);
      return ffi::Error::Success();
    }
  });
}

ffi::Error FFNForwardImpl(ffi::ThreadPool threads, int64_t set, float quantile, float huber, int64_t ddof, Floats scores, Floats x2,
                          Floats k2, Floats v, ffi::Result<Floats> y, ffi::Result<Floats> statistics, ffi::Result<Ints> active) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (scores.dimensions().size() != 2 || x2.dimensions().size() != 2 || v.dimensions().size() != 2)
    return wrong_shape("scores", scores, "two axes, as x2 and v");
  const int64_t tokens = scores.dimensions()[0], neurons = scores.dimensions()[1], width = x2.dimensions()[1], D = v.dimensions()[1];
  REQUIRE_SHAPE(x2, tokens, width);
  REQUIRE_SHAPE(k2, neurons, width);
  REQUIRE_SHAPE(v, neurons, D);
  REQUIRE_SHAPE(*y, tokens, D);
  REQUIRE_SHAPE(*statistics, tokens, 3);
  REQUIRE_SHAPE(*active, tokens);
  XlaPool pool(threads);
  FFNForward m{int(tokens), int(neurons), int(width), int(D), quantile, huber, int(ddof), scores.typed_data(), x2.typed_data(),
               k2.typed_data(), v.typed_data(), y->typed_data(), statistics->typed_data(), active->typed_data()};
  compute(*use, m, pool);
  return ffi::Error::Success();
}

ffi::Error FFNBackwardImpl(ffi::ThreadPool threads, int64_t set, float huber, Floats scores, Floats thetas, Floats x1, Floats x2, Floats dy,
                           Floats k1, Floats k2, Floats v, ffi::Result<Floats> dx1, ffi::Result<Floats> dx2, ffi::Result<Floats> dk1,
                           ffi::Result<Floats> dk2, ffi::Result<Floats> dv, ffi::Result<Floats> dtheta) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (scores.dimensions().size() != 2 || x1.dimensions().size() != 2 || x2.dimensions().size() != 2 || v.dimensions().size() != 2)
    return wrong_shape("scores", scores, "two axes, as x1, x2 and v");
  const int64_t tokens = scores.dimensions()[0], neurons = scores.dimensions()[1], D = v.dimensions()[1];
  const int64_t r = x1.dimensions()[1], width = x2.dimensions()[1];
  REQUIRE_SHAPE(thetas, tokens);
  REQUIRE_SHAPE(x1, tokens, r);
  REQUIRE_SHAPE(x2, tokens, width);
  REQUIRE_SHAPE(dy, tokens, D);
  REQUIRE_SHAPE(k1, neurons, r);
  REQUIRE_SHAPE(k2, neurons, width);
  REQUIRE_SHAPE(v, neurons, D);
  REQUIRE_SHAPE(*dx1, tokens, r);
  REQUIRE_SHAPE(*dx2, tokens, width);
  REQUIRE_SHAPE(*dk1, neurons, r);
  REQUIRE_SHAPE(*dk2, neurons, width);
  REQUIRE_SHAPE(*dv, neurons, D);
  REQUIRE_SHAPE(*dtheta, tokens);
  XlaPool pool(threads);
  FFNBackward m{int(tokens), int(neurons), int(r), int(width), int(D), huber, scores.typed_data(), thetas.typed_data(), x1.typed_data(),
                x2.typed_data(), dy.typed_data(), k1.typed_data(), k2.typed_data(), v.typed_data(), dx1->typed_data(),
                dx2->typed_data(), dk1->typed_data(), dk2->typed_data(), dv->typed_data(), dtheta->typed_data()};
  compute(*use, m, pool);
  return ffi::Error::Success();
}

ffi::Error TransposeImpl(ffi::ThreadPool threads, int64_t set, Floats x, ffi::Result<Floats> y) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (x.dimensions().size() != 2) return wrong_shape("x", x, "two axes");
  const int64_t rows = x.dimensions()[0], columns = x.dimensions()[1];
  REQUIRE_SHAPE(*y, columns, rows);
  XlaPool pool(threads);
  compute(*use, Transpose{int(rows), int(columns), x.typed_data(), y->typed_data()}, pool);
  return ffi::Error::Success();
}

ffi::Error ReadImpl(ffi::ThreadPool threads, int64_t set, Floats x, ffi::Result<Floats> y) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  XlaPool pool(threads);
  compute(*use, Read{int64_t(x.element_count()), x.typed_data(), y->typed_data()}, pool);
  return ffi::Error::Success();
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)  // it checks malloc's buffers, not ours
void* allocate_scratch(size_t bytes) { return std::malloc(bytes ? bytes : 1); }
void free_scratch(void* latest) { std::free(latest); }
#else
void* allocate_scratch(size_t bytes) {
  if (scratch.depth == scratch.buffers.size()) scratch.buffers.push_back({nullptr, 0});
  ScratchStack::Buffer& b = scratch.buffers[scratch.depth++];
  if (b.bytes < bytes || !b.address) {
    std::free(b.address);
    b.bytes = (bytes + 127) / 64 * 64;
    b.address = std::aligned_alloc(64, b.bytes);
    if (!b.address) std::abort();
  }
  return b.address;
}
void free_scratch(void*) { --scratch.depth; }
#endif
}  // namespace spark

extern "C" int spark_best_set() { return spark::best(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_matmul, spark::MatmulImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set")
                                  .Arg<spark::Floats>().Arg<ffi::AnyBuffer>().Arg<spark::Floats>().Ret<spark::Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_ffn, spark::FFNImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Attr<float>("quantile").Attr<float>("huber")
                                  .Arg<spark::Floats>().Arg<ffi::AnyBuffer>().Arg<spark::Floats>().Arg<ffi::AnyBuffer>()
                                  .Arg<spark::Floats>().Ret<spark::Floats>().Ret<spark::Ints>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_attention, spark::AttentionImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Attr<int64_t>("k").Attr<int64_t>("window")
                                  .Attr<float>("cap").Arg<spark::Floats>().Arg<spark::Floats>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Arg<spark::Ints>().Arg<spark::Ints>().Arg<spark::Floats>().Ret<spark::Floats>().Ret<spark::Ints>()
                                  .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_ffn_forward, spark::FFNForwardImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Attr<float>("quantile").Attr<float>("huber")
                                  .Attr<int64_t>("ddof").Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>()
                                  .Arg<spark::Floats>().Ret<spark::Floats>().Ret<spark::Floats>().Ret<spark::Ints>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_ffn_backward, spark::FFNBackwardImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Attr<float>("huber")
                                  .Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>()
                                  .Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>()
                                  .Ret<spark::Floats>().Ret<spark::Floats>().Ret<spark::Floats>().Ret<spark::Floats>()
                                  .Ret<spark::Floats>().Ret<spark::Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_transpose, spark::TransposeImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Arg<spark::Floats>().Ret<spark::Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_read, spark::ReadImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Arg<spark::Floats>().Ret<spark::Floats>());
