// Temporary memory of the kernels.

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace spark {
namespace {

struct Buffer { void* address; size_t bytes; };

// A thread's stack of scratch buffers: the first `depth` are in use, the others are kept for reuse.
struct ScratchStack {
  std::vector<Buffer> buffers;
  size_t depth = 0;
  ~ScratchStack() {
    for (Buffer& b : buffers) std::free(b.address);
  }
};
thread_local ScratchStack scratch;

// Large ones are shared by all threads: XLA calls kernels from any of them, and each would keep its own.
constexpr size_t LARGE = 1 << 20;
struct LargeScratch {
  std::mutex mutex;
  std::vector<Buffer> used, idle;
};
LargeScratch& large_scratch() {
  static LargeScratch* const large = new LargeScratch;  // never destroyed: a thread may outlive it
  return *large;
}

void* fresh(size_t bytes) {
  void* address = std::aligned_alloc(64, bytes);
  if (!address) std::abort();
  return address;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)  // it checks malloc's buffers, not ours
void* allocate_scratch(size_t bytes) { return std::malloc(bytes ? bytes : 1); }
void free_scratch(void* latest) { std::free(latest); }
#else
void* allocate_scratch(size_t bytes) {
  bytes = (bytes + 127) / 64 * 64;
  if (bytes >= LARGE) {
    LargeScratch& large = large_scratch();
    const std::lock_guard<std::mutex> lock(large.mutex);
    // The smallest that suffices. If none does, a new one replaces the largest.
    auto by_size = [](const Buffer& a, const Buffer& b) { return a.bytes < b.bytes; };
    auto found = std::lower_bound(large.idle.begin(), large.idle.end(), Buffer{nullptr, bytes}, by_size);
    Buffer b;
    if (found == large.idle.end()) {
      if (!large.idle.empty()) {
        std::free(large.idle.back().address);
        large.idle.pop_back();
      }
      b = {fresh(bytes), bytes};
    } else {
      b = *found;
      large.idle.erase(found);
    }
    large.used.push_back(b);
    return b.address;
  }
  if (scratch.depth == scratch.buffers.size()) scratch.buffers.push_back({nullptr, 0});
  Buffer& b = scratch.buffers[scratch.depth++];
  if (b.bytes < bytes) {
    std::free(b.address);
    b = {fresh(bytes), bytes};
  }
  return b.address;
}
void free_scratch(void* latest) {
  if (scratch.depth && scratch.buffers[scratch.depth - 1].address == latest) {
    --scratch.depth;
    return;
  }
  LargeScratch& large = large_scratch();
  const std::lock_guard<std::mutex> lock(large.mutex);
  auto found = std::find_if(large.used.begin(), large.used.end(), [&](const Buffer& b) { return b.address == latest; });
  auto after = std::find_if(large.idle.begin(), large.idle.end(), [&](const Buffer& b) { return b.bytes >= found->bytes; });
  large.idle.insert(after, *found);
  large.used.erase(found);
}
#endif
}  // namespace spark
