// CUDA threads as threads of the CPU, for ThreadSanitizer.
#pragma once

#include <barrier>
#include <functional>
#include <thread>
#include <vector>

namespace cuda_on_cpu {

class Barrier {
 public:
  explicit Barrier(int threads) : barrier_(threads) {}
  void wait() { barrier_.arrive_and_wait(); }
  void drop() { barrier_.arrive_and_drop(); }

 private:
  std::barrier<> barrier_;
};

inline void*& who_am_i() {
  static thread_local void* who = nullptr;
  return who;
}
inline void* current() { return who_am_i(); }

inline void run_all(int count, const std::function<void*(int)>& who,
                    const std::function<void()>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      who_am_i() = who(i);
      body();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace cuda_on_cpu
