// CUDA threads as fibers of one CPU thread: they change places at barriers only.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

namespace cuda_on_cpu {

struct Fiber {
  static constexpr size_t stack_bytes = 1 << 18;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  void* who = nullptr;
  bool done = false;
  const unsigned* waits = nullptr;  // for this count to leave `seen`
  unsigned seen = 0;
};

struct Scheduler {
  ucontext_t context;
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
};

inline Scheduler& scheduler() {
  static thread_local Scheduler one;
  return one;
}

inline void* current() { return scheduler().running->who; }

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    if (++arrived_ == threads_) return open();
    Scheduler& s = scheduler();
    s.running->waits = &opened_;
    s.running->seen = opened_;
    swapcontext(&s.running->context, &s.context);
  }

  // A thread that has returned is waited for no longer.
  void drop() {
    if (--threads_ == arrived_ && threads_ > 0) open();
  }

 private:
  void open() {
    arrived_ = 0;
    ++opened_;
  }

  int threads_, arrived_ = 0;
  unsigned opened_ = 0;
};

inline void fiber_main() {
  Scheduler& s = scheduler();
  (*s.body)();
  s.running->done = true;
  swapcontext(&s.running->context, &s.context);
}

// Runs `body` `count` times, each as `who(i)`, until all are done.
inline void run_all(int count, const std::function<void*(int)>& who,
                    const std::function<void()>& body) {
  Scheduler& s = scheduler();
  while (static_cast<int>(s.fibers.size()) < count) s.fibers.push_back(std::make_unique<Fiber>());
  s.body = &body;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *s.fibers[i];
    fiber.who = who(i);
    fiber.done = false;
    fiber.waits = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, Fiber::stack_bytes};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (int left = count; left > 0;) {
    bool moved = false;
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = *s.fibers[i];
      if (fiber.done || (fiber.waits && *fiber.waits == fiber.seen)) continue;
      fiber.waits = nullptr;
      moved = true;
      s.running = &fiber;
      swapcontext(&s.context, &fiber.context);
      left -= fiber.done;
    }
    if (!moved) {
      std::fprintf(stderr, "cuda_on_cpu: divergent barrier, %d threads wait for ever\n", left);
      std::exit(3);
    }
  }
}

}  // namespace cuda_on_cpu
