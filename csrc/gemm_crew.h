// Memory and threads of one packed product; torch-free.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <utility>

#include "float_mode.h"
#include "scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace orthonorm::gemm {

using Range = std::function<void(int64_t, int64_t)>;
using Parallel = std::function<void(int64_t, const Range&)>;

// Aligned to cache lines and vectors; large memory to huge pages, without which a 2048 x 2048
// product spends a tenth of its time in page faults (2026-11).
class Memory {
 public:
  explicit Memory(int64_t bytes)
      : bytes_(bytes),
        align_(large() ? HUGE_PAGE : ALIGN),
        data_(::operator new(static_cast<size_t>(bytes), std::align_val_t(align_))) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (large()) madvise(data_, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a hint only
#endif
  }
  ~Memory() { ::operator delete(data_, std::align_val_t(align_)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  int64_t bytes() const { return bytes_; }
  bool large() const { return bytes_ >= 2 * HUGE_PAGE; }
  void* data() const { return data_; }

  static constexpr int64_t ALIGN = 64, HUGE_PAGE = int64_t{2} << 20;

 private:
  int64_t bytes_;
  size_t align_;
  void* data_;
};

// Large memory that calls leave to those after them: the pages of new memory are cleared by the
// system, 6 percent of a 2048 x 2048 polynomial in float32 (2026-11). No lock: fork may happen.
class Arena {
 public:
  std::unique_ptr<Memory> take(int64_t bytes) {
    for (auto& slot : slots_) {
      std::unique_ptr<Memory> block(slot.exchange(nullptr));
      if (block == nullptr) continue;
      if (block->bytes() >= bytes && block->bytes() / 2 <= bytes) return block;
      give(std::move(block));
    }
    return std::make_unique<Memory>(bytes);
  }
  void give(std::unique_ptr<Memory> block) {
    if (!block->large() || block->bytes() > KEPT) return;
    for (auto& slot : slots_) {
      Memory* none = nullptr;
      if (slot.compare_exchange_strong(none, block.get())) {
        block.release();
        return;
      }
    }
    const size_t oldest = turn_.fetch_add(1, std::memory_order_relaxed) % SLOTS;
    block.reset(slots_[oldest].exchange(block.release()));
  }

 private:
  static constexpr size_t SLOTS = 4;
  static constexpr int64_t KEPT = int64_t{128} << 20;  // more takes longer to use than to clear
  std::atomic<Memory*> slots_[SLOTS] = {};
  std::atomic<size_t> turn_{0};
};

inline Arena arena;

// Memory for one call.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : held_(bytes), block_(arena.take(bytes)) {}
  ~Workspace() { arena.give(std::move(block_)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(static_cast<char*>(block_->data()) + used_);
    used_ += bytes_for<T>(count);
    return taken;
  }
  template <class T>
  static int64_t bytes_for(int64_t count) {
    constexpr int64_t line = Memory::ALIGN;
    return (count * static_cast<int64_t>(sizeof(T)) + line - 1) / line * line;
  }

 private:
  Held held_;
  std::unique_ptr<Memory> block_;
  int64_t used_ = 0;
};

// The threads of one call: `each` hands out indices one by one, so a slow core takes fewer. All have
// the float mode of the caller.
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
    const uint64_t mode = float_mode();
    parallel(std::min(threads, count), [&](int64_t begin, int64_t end) {
      const FloatMode same(mode);
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
