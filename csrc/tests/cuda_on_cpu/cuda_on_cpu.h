// CUDA C++ kernels compiled by a plain C++20 compiler and run on the CPU, for tests: blocks, shared
// memory, barriers, warp shuffles and votes, atomics, clusters of blocks; tensor cores in
// mma_on_cpu.h.
//
// Each CUDA thread is a fiber, and a barrier that not all of a block's threads reach is reported.
// With CUDA_ON_CPU_THREADS each is a std::thread instead, so that ThreadSanitizer sees what no
// barrier orders. Shared memory is filled with 0xA5 for every block and AddressSanitizer guards its
// ends, and all of it once the block's threads have returned. Threads that have returned count as
// arrived. Not modelled: asynchronous copies, wgmma; the memory model is the CPU's, so a missing
// fence between blocks is not found.
#pragma once

#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(at, size) static_cast<void>(0)
#endif

#ifdef CUDA_ON_CPU_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  alignas(16) unsigned x;
  unsigned y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace cuda_on_cpu {

struct Warp {
  static constexpr size_t most = 32;  // bytes a lane can show
  Barrier barrier;
  unsigned char shown[2][32 * most] = {};
  explicit Warp(int threads) : barrier(threads) {}
};

// What one block has to itself: barriers and shared memory.
struct Block {
  static constexpr size_t arena = 1 << 18;
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<unsigned char[]> statics{new unsigned char[arena]};
  std::vector<unsigned char> dynamic;
  std::atomic<int> running;  // threads

  Block(int threads, size_t dynamic_bytes)
      : barrier(threads), dynamic(dynamic_bytes, 0xA5), running(threads) {
    for (int t = 0; t < threads; t += 32) {
      warps.push_back(std::make_unique<Warp>(threads - t < 32 ? threads - t : 32));
    }
    std::memset(statics.get(), 0xA5, arena);
    ASAN_POISON_MEMORY_REGION(statics.get(), arena);
  }
  ~Block() {
    ASAN_UNPOISON_MEMORY_REGION(statics.get(), arena);
    ASAN_UNPOISON_MEMORY_REGION(dynamic.data(), dynamic.size());
  }

  // A thread returns; with the last of them the shared memory goes.
  void leave() {
    barrier.drop();
    if (--running == 0) ASAN_POISON_MEMORY_REGION(dynamic.data(), dynamic.size());
  }
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Who the running CUDA thread is.
struct Here {
  Index thread, block, threads{1, 1, 1}, blocks{1, 1, 1};
  Block* own = nullptr;
  const std::unique_ptr<Block>* cluster = nullptr;  // the blocks that run together
  int rank = 0;                                     // own place in it
  Barrier* all = nullptr;                           // of their threads
  unsigned shows = 0;  // how often this thread has shown a value

  unsigned lane() const { return thread.x % 32; }
  Warp& warp() const { return *own->warps[thread.x / 32]; }
};

inline Here& here() { return *static_cast<Here*>(current()); }

// A place in every block's shared memory for one declaration, found when it first runs.
class Region {
 public:
  explicit Region(size_t bytes) : bytes_(bytes) {
    static std::atomic<size_t> used{64};
    const size_t rounded = (bytes + 127) / 64 * 64;  // a gap of at least 64 bytes behind it
    offset_ = used.fetch_add(rounded);
    if (offset_ + rounded > Block::arena) {
      std::fprintf(stderr, "cuda_on_cpu: all kernels together declare too much shared memory\n");
      std::abort();
    }
  }
  void* in(Block& block) const {
    ASAN_UNPOISON_MEMORY_REGION(block.statics.get() + offset_, bytes_);
    return block.statics.get() + offset_;
  }

 private:
  size_t bytes_, offset_;
};

// Runs `kernel` for every thread of every block, `together` blocks at a time.
template <class Kernel>
void run(int64_t blocks, int threads, size_t shared_bytes, int64_t together, const Kernel& kernel) {
  for (int64_t first = 0; first < blocks; first += together) {
    Barrier all(static_cast<int>(together * threads));
    std::vector<std::unique_ptr<Block>> cluster;
    std::vector<Here> heres(together * threads);
    for (int64_t i = 0; i < together; ++i) {
      cluster.push_back(std::make_unique<Block>(threads, shared_bytes));
      for (int t = 0; t < threads; ++t) {
        Here& at = heres[i * threads + t];
        at.thread.x = static_cast<unsigned>(t);
        at.block.x = static_cast<unsigned>(first + i);
        at.threads.x = static_cast<unsigned>(threads);
        at.blocks.x = static_cast<unsigned>(blocks);
        at.own = cluster[i].get();
        at.rank = static_cast<int>(i);
        at.all = &all;
      }
    }
    for (Here& at : heres) at.cluster = cluster.data();
    run_all(static_cast<int>(heres.size()), [&](int i) -> void* { return &heres[i]; }, [&] {
      const Here at = here();
      kernel();
      at.warp().barrier.drop();
      at.own->leave();
      at.all->drop();
    });
  }
}

// What every lane of a warp showed.
template <class T>
struct Shown {
  const unsigned char* from;

  T operator[](unsigned lane) const {
    T value;
    std::memcpy(&value, from + lane * Warp::most, sizeof value);
    return value;
  }
};

// Shows the other lanes a value; every lane of the warp must call it. Two places take turns, so one
// barrier is enough: whoever writes the first again has seen all lanes leave it for the second.
template <class T>
Shown<T> shown(const T& value) {
  static_assert(sizeof(T) <= Warp::most);
  Here& at = here();
  unsigned char* const place = at.warp().shown[at.shows++ % 2];
  std::memcpy(place + at.lane() * Warp::most, &value, sizeof value);
  at.warp().barrier.wait();
  return {place};
}

// Lane `from`'s value.
template <class T>
T exchanged(T value, unsigned from) {
  return shown(value)[from % 32];
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::here().thread)
#define blockIdx (cuda_on_cpu::here().block)
#define blockDim (cuda_on_cpu::here().threads)
#define gridDim (cuda_on_cpu::here().blocks)

// The parameter of a kernel that lies in constant memory; shared memory of a fixed size; shared
// memory of the size the launch gives.
#define ORTHONORM_CONSTANT(...) const __VA_ARGS__&
#define ORTHONORM_SHARED(type, name, count)                          \
  static const cuda_on_cpu::Region name##_region((count) * sizeof(type)); \
  type* const name = static_cast<type*>(name##_region.in(*cuda_on_cpu::here().own))
#define ORTHONORM_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(cuda_on_cpu::here().own->dynamic.data())

inline void __syncthreads() { cuda_on_cpu::here().own->barrier.wait(); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::here().warp().barrier.wait(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_cpu::exchanged(value, static_cast<unsigned>(lane));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::exchanged(value, cuda_on_cpu::here().lane() ^ static_cast<unsigned>(mask));
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = cuda_on_cpu::here().lane();
  return cuda_on_cpu::exchanged(value, lane + delta < 32 ? lane + delta : lane);
}
inline unsigned __ballot_sync(unsigned, int vote) {
  const auto all = cuda_on_cpu::shown(vote);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= (all[lane] != 0 ? 1u : 0u) << lane;
  return votes;
}

template <class T>
T atomicAdd(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_add(value, std::memory_order_relaxed);
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

namespace orthonorm::cuda {

struct Device;
void check(cudaError_t error);

template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int cluster, int64_t blocks, int threads,
                     int64_t shared_bytes, const Device&, const Arguments&... arguments) {
  if (blocks > INT32_MAX || blocks % cluster != 0 || threads > 1024) {
    check(cudaErrorInvalidConfiguration);
  }
  cuda_on_cpu::run(blocks, threads, static_cast<size_t>(shared_bytes), cluster,
                   [&] { kernel(arguments...); });
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            const Device& device, const Arguments&... arguments) {
  launch_clusters(kernel, 1, blocks, threads, shared_bytes, device, arguments...);
}

inline int rank_in_cluster() { return cuda_on_cpu::here().rank; }
inline void cluster_sync() { cuda_on_cpu::here().all->wait(); }

// What lies at `own` in this block's dynamic shared memory, in the block of that rank.
template <class T>
T* of_rank(T* own, int rank) {
  const auto& at = cuda_on_cpu::here();
  const size_t offset = reinterpret_cast<const unsigned char*>(own) - at.own->dynamic.data();
  return reinterpret_cast<T*>(at.cluster[rank]->dynamic.data() + offset);
}

}  // namespace orthonorm::cuda
