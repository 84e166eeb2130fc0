// Power iteration on a list of matrices by a team of threads; torch-free.
//
// Matrices of one block go whole to one thread, several at a time. Larger ones are shared block by
// block: a thread that finds no block left in a matrix helps with the next one rather than wait for
// the end of the sweep, and goes back as soon as the next sweep starts, while the matrix is still
// in the last-level cache. Nobody waits while anything can be done.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "power_matrix.h"
#include "scratch.h"

namespace orthonorm::power {

struct AlignedDelete {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{LINE}); }
};
using Memory = std::unique_ptr<std::byte[], AlignedDelete>;

inline Memory allocate(int64_t bytes) {
  const size_t size = static_cast<size_t>(std::max<int64_t>(bytes, LINE));
  return Memory(static_cast<std::byte*>(::operator new[](size, std::align_val_t{LINE})));
}

// Elements read in all sweeps that make waking a thread worth it, and those of a bundle.
inline constexpr int64_t WORTH_A_THREAD = 32768;

// Which matrices are shared and which go in bundles, and what memory both need.
struct Plan {
  std::vector<int64_t> shared, small;
  std::vector<int64_t> bundles = {0};  // bundle b is small[bundles[b]] .. small[bundles[b + 1]]
  int64_t threads = 1;
  int64_t shared_bytes = 0, small_bytes = 0, scratch_bytes = 0;

  Plan(const std::vector<Matrix>& matrices, int64_t available) {
    int64_t cost = 0, small_cost = 0;
    for (const Matrix& m : matrices) cost += m.rows * m.cols * m.sweeps();
    threads = std::max<int64_t>(std::min(available, cost / WORTH_A_THREAD), 1);
    for (size_t i = 0; i < matrices.size(); ++i) {
      const Matrix& m = matrices[i];
      const bool share = threads > 1 && Cut(m.rows, m.cols).blocks > 1;
      (share ? shared : small).push_back(static_cast<int64_t>(i));
      int64_t& bytes = share ? shared_bytes : small_bytes;
      bytes = std::max(bytes, Iteration::memory_for(m));
      scratch_bytes = std::max(scratch_bytes, Iteration::scratch_for(m));
      if (!share) small_cost += m.rows * m.cols * m.sweeps();
    }
    const int64_t enough = std::max(WORTH_A_THREAD, small_cost / (8 * threads));
    int64_t sum = 0;
    for (size_t k = 0; k < small.size(); ++k) {
      const Matrix& m = matrices[small[k]];
      sum += m.rows * m.cols * m.sweeps();
      if (sum >= enough || k + 1 == small.size()) bundles.push_back(k + 1), sum = 0;
    }
  }
};

template <class Io>
class Team {
 public:
  Team(const std::vector<Matrix>& matrices, const Io& io, const Plan& plan, Isa chosen)
      : matrices_(matrices),
        io_(io),
        plan_(plan),
        isa_(chosen),
        slots_(std::min<int64_t>(plan.threads, static_cast<int64_t>(plan.shared.size()))),
        own_bytes_(plan.small_bytes + plan.scratch_bytes),
        bytes_(static_cast<int64_t>(slots_.size()) * plan.shared_bytes +
               plan.threads * own_bytes_),
        held_(bytes_),
        memory_(allocate(bytes_)) {}

  // The work of member `t` of plan.threads; returns when there is none left for it.
  void work(int64_t t) {
    const int64_t slots = static_cast<int64_t>(slots_.size());
    std::byte* const own = memory_.get() + slots * plan_.shared_bytes + t * own_bytes_;
    std::byte* const scratch = own + plan_.small_bytes;
    Task task{Task::wait, 0, -1};
    for (;;) {
      task = claim(task);
      switch (task.kind) {
        case Task::none: return;
        case Task::wait: pause(task.item); break;
        case Task::bundle: bundle(task.item, own, scratch); break;
        case Task::open: open(task.slot, task.item); break;
        case Task::block:
          slots_[task.slot].iteration.block(task.item, scratch);
          finish(slots_[task.slot], task.item);
          break;
      }
    }
  }

 private:
  enum class State : char { free, busy, done };  // of a block in a sweep

  // A matrix that threads share.
  struct Slot {
    Iteration iteration;
    std::vector<State> blocks;
    int64_t left = 0;   // blocks not done
    int64_t order = 0;  // which matrix came first
    bool open = false;
  };
  struct Task {
    enum Kind { none, wait, bundle, open, block } kind;
    int64_t item, slot;  // item: block, matrix, bundle, or the version to wait for
  };

  // A free block, or -1: the one behind `last`, which is being prefetched; else the start of the
  // longest free run, or its middle if somebody works towards it.
  static int64_t free_block(const Slot& slot, int64_t last) {
    const int64_t count = static_cast<int64_t>(slot.blocks.size());
    if (last >= 0 && last + 1 < count && slot.blocks[last + 1] == State::free) return last + 1;
    int64_t longest = 0, start = -1;
    for (int64_t b = 0, run = 0; b < count; ++b) {
      run = slot.blocks[b] == State::free ? run + 1 : 0;
      if (run > longest) longest = run, start = b - run + 1;
    }
    if (start > 0 && slot.blocks[start - 1] == State::busy) start += longest / 2;
    return start;
  }

  // The next task of a thread that did `last`.
  Task claim(const Task& last) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t count = static_cast<int64_t>(slots_.size());
    int64_t best = -1, block = -1, closed = -1;
    for (int64_t s = 0; s < count; ++s) {
      const Slot& slot = slots_[s];
      if (!slot.open) closed = s;
      if (!slot.open || (best >= 0 && slot.order > slots_[best].order)) continue;
      const bool same = last.kind == Task::block && last.slot == s;
      const int64_t b = free_block(slot, same ? last.item : -1);
      if (b >= 0) best = s, block = b;
    }
    if (best >= 0) {
      slots_[best].blocks[block] = State::busy;
      return {Task::block, block, best};
    }
    if (closed >= 0 && opened_ < plan_.shared.size()) {
      Slot& slot = slots_[closed];
      slot.open = true, slot.order = static_cast<int64_t>(opened_);
      slot.blocks.clear();  // none to hand out before it is open
      return {Task::open, plan_.shared[opened_++], closed};
    }
    if (bundled_ + 1 < plan_.bundles.size()) {
      return {Task::bundle, static_cast<int64_t>(bundled_++), -1};
    }
    for (const Slot& slot : slots_) {
      if (slot.open) return {Task::wait, version_.load(std::memory_order_relaxed), -1};
    }
    return {Task::none, 0, -1};
  }

  // Until another thread has opened, swept or closed something.
  void pause(int64_t version) const {
    for (int64_t spins = 0; version_.load(std::memory_order_acquire) == version; ++spins) {
      if (spins > 64) std::this_thread::yield();
    }
  }

  // Hands out the next sweep's blocks, or gives the slot back.
  void publish(Slot& slot) {
    const std::lock_guard<std::mutex> lock(mutex_);
    slot.open = !slot.iteration.done();
    slot.left = slot.iteration.blocks();
    slot.blocks.assign(slot.left, State::free);
    version_.fetch_add(1, std::memory_order_release);
  }

  void open(int64_t s, int64_t matrix) {
    std::byte* const memory = memory_.get() + s * plan_.shared_bytes;
    slots_[s].iteration.begin(io_, matrices_[matrix], matrix, memory, isa_);
    publish(slots_[s]);
  }

  // The thread that finishes a sweep's last block adds up and starts the next sweep.
  void finish(Slot& slot, int64_t block) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      slot.blocks[block] = State::done;
      if (--slot.left > 0) return;
    }
    slot.iteration.end_sweep(io_);
    publish(slot);
  }

  void bundle(int64_t b, std::byte* memory, std::byte* scratch) const {
    for (int64_t k = plan_.bundles[b]; k < plan_.bundles[b + 1]; ++k) {
      const int64_t matrix = plan_.small[k];
      Iteration iteration;
      iteration.begin(io_, matrices_[matrix], matrix, memory, isa_);
      while (!iteration.done()) {
        for (int64_t i = 0; i < iteration.blocks(); ++i) iteration.block(i, scratch);
        iteration.end_sweep(io_);
      }
    }
  }

  const std::vector<Matrix>& matrices_;
  const Io& io_;
  const Plan& plan_;
  const Isa isa_;
  std::vector<Slot> slots_;
  const int64_t own_bytes_, bytes_;
  const Held held_;
  Memory memory_;
  std::mutex mutex_;
  size_t opened_ = 0, bundled_ = 0;
  std::atomic<int64_t> version_{0};
};

// Iterates on all matrices, none of them without elements. `parallel(n, f)` calls f(i) for i in
// [0, n), on up to `threads` threads or one after the other.
template <class Io, class Parallel>
void iterate(const std::vector<Matrix>& matrices, const Io& io, int64_t threads,
             const Parallel& parallel, Isa chosen) {
  const Plan plan(matrices, threads);
  Team<Io> team(matrices, io, plan, chosen);
  parallel(plan.threads, [&](int64_t t) { team.work(t); });
}

}  // namespace orthonorm::power
