// How much memory kernels hold beside tensors, which torch's allocator and profiler do not see;
// torch-free.
#pragma once

#include <atomic>
#include <cstdint>

namespace orthonorm {

// Bytes held now, and the most that were held at once since `restart`.
class ScratchCount {
 public:
  void add(int64_t bytes) {
    const int64_t now = held_.fetch_add(bytes, std::memory_order_relaxed) + bytes;
    int64_t most = most_.load(std::memory_order_relaxed);
    while (now > most && !most_.compare_exchange_weak(most, now, std::memory_order_relaxed)) {
    }
  }
  void restart() { most_ = held_.load(); }
  int64_t held() const { return held_; }
  int64_t most() const { return most_; }

 private:
  std::atomic<int64_t> held_{0}, most_{0};
};

inline ScratchCount scratch_count;

// Counts bytes for as long as it lives.
class Held {
 public:
  explicit Held(int64_t bytes) : bytes_(bytes) { scratch_count.add(bytes_); }
  ~Held() { scratch_count.add(-bytes_); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

 private:
  int64_t bytes_;
};

}  // namespace orthonorm
