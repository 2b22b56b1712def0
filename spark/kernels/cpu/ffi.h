// What the custom calls of XLA share: XLA's own threads, so that no second pool of threads competes with it; the choice of an instruction
// set; checks of shapes.
#pragma once

#include <algorithm>
#include <atomic>
#include <climits>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>

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

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

}  // namespace
}  // namespace spark
