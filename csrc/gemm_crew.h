// Memory and threads of one packed product; torch-free.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <new>

#include "scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace orthonorm::gemm {

using Range = std::function<void(int64_t, int64_t)>;
using Parallel = std::function<void(int64_t, const Range&)>;

// Memory for one call, aligned to cache lines and vectors; large memory to huge pages, without
// which a 2048 x 2048 product spends a tenth of its time in page faults (2026-11).
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : align_(bytes < LARGE ? ALIGN : HUGE_PAGE), held_(bytes) {
    data_ = ::operator new(static_cast<size_t>(bytes), std::align_val_t(align_));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes >= LARGE) madvise(data_, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a hint only
#endif
  }
  ~Workspace() { ::operator delete(data_, std::align_val_t(align_)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(static_cast<char*>(data_) + used_);
    used_ += bytes_for<T>(count);
    return taken;
  }
  template <class T>
  static int64_t bytes_for(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + ALIGN - 1) / ALIGN * ALIGN;
  }

 private:
  static constexpr int64_t ALIGN = 64, HUGE_PAGE = int64_t{2} << 20, LARGE = 2 * HUGE_PAGE;
  size_t align_;
  Held held_;
  void* data_ = nullptr;
  int64_t used_ = 0;
};

// The threads of one call: `each` hands out indices one by one, so a slow core takes fewer.
struct Crew {
  int64_t threads;
  const Parallel& parallel;

  template <class F>
  void each(int64_t count, const F& f) const {
    if (threads <= 1 || count <= 1) {
      for (int64_t i = 0; i < count; ++i) f(int64_t{0}, i);
      return;
    }
    std::atomic<int64_t> next{0};
    parallel(std::min(threads, count), [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(slot, i);
      }
    });
  }
};

// Below this many operations one thread is done before others have started.
inline constexpr double SERIAL_WORK = 2e6;
// Matrices of a batch below this are spread over the threads whole, in any number.
inline constexpr double WHOLE_WORK = 2e7;

// Whether matrices of a batch are better done whole, one on each thread, than one after another by
// all of them: 12 products of 768x768 in bfloat16 took 8.5 ms together and 6.7 ms apart (2026-11).
inline bool whole(int64_t batch, int64_t threads, double work) {
  if (batch < threads) return false;
  return work <= WHOLE_WORK || batch % threads == 0 || batch >= 4 * threads;
}

}  // namespace orthonorm::gemm
