// One bug of each kind, to see that the emulation finds it: planted KIND.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/sums.h"

using namespace orthonorm;
using namespace orthonorm::cuda;

namespace {

constexpr int width = 64;

// Reverses the elements of every block through shared memory.
__global__ void reverse_kernel(const float* from, float* to, int64_t count, int reach, bool waits) {
  ORTHONORM_SHARED(float, values, width);
  const int64_t first = int64_t{blockIdx.x} * width, i = first + threadIdx.x;
  values[threadIdx.x + reach] = i < count ? from[i] : 0;
  if (waits) __syncthreads();
  if (i < count) to[i] = values[width - 1 - threadIdx.x];
}

// Copies; its tail begins where `tail` says.
__global__ void copy_kernel(const float* from, float* to, int64_t tail, int64_t limit) {
  int64_t i = int64_t{blockIdx.x} * width + threadIdx.x;
  if (i >= tail) ++i;
  if (i < limit) to[i] = from[i];
}

__global__ void divergent_kernel(float* to) {
  if (threadIdx.x < 7) __syncthreads();
  to[threadIdx.x] = warp_sum(1.0);
}

// Sums of all threads, the wrong way: `together` in one atomic step or not.
__global__ void count_kernel(int* total, bool together) {
  if (together) {
    atomicAdd(total, 1);
  } else {
    *total += 1;
  }
}

// Every thread reads what its like has written in the next block of the cluster.
__global__ void neighbour_kernel(int* to, bool waits, bool stays) {
  ORTHONORM_DYNAMIC_SHARED(int, own);
  const int next = 1 - rank_in_cluster();
  own[threadIdx.x] = static_cast<int>(blockIdx.x);
  if (waits) cluster_sync();
  to[blockIdx.x * width + threadIdx.x] = of_rank(own, next)[threadIdx.x];
  if (stays) cluster_sync();
}

__global__ void unaligned_kernel(const char* from, unsigned* to) {
  to[threadIdx.x] = reinterpret_cast<const uint4*>(from)->x;
}

}  // namespace

int main(int, char** arguments) {
  const std::string kind = arguments[1];
  const Device device{nullptr, nullptr};
  const int64_t count = 100;
  std::vector<float> from(count), to(count, -1);
  for (int64_t i = 0; i < count; ++i) from[i] = static_cast<float>(i);
  if (kind == "none" || kind == "overflow_of_shared" || kind == "missing_barrier") {
    const int reach = kind == "overflow_of_shared" ? 1 : 0;
    launch(reverse_kernel, 2, width, 0, device, from.data(), to.data(), count, reach,
           kind != "missing_barrier");
    launch(count_kernel, 1, width, 0, device, reinterpret_cast<int*>(to.data()), true);
    return to[1] == 62 ? 0 : 1;
  }
  if (kind == "clusters" || kind == "missing_cluster_barrier" || kind == "left_early") {
    std::vector<int> found(4 * width);
    launch_clusters(neighbour_kernel, 2, 4, width, width * sizeof(int), device, found.data(),
                    kind != "missing_cluster_barrier", kind != "left_early");
    return found[0] == 1 && found[3 * width] == 2 ? 0 : 1;
  }
  if (kind == "overflow" || kind == "wrong_tail") {
    const bool overflows = kind == "overflow";
    launch(copy_kernel, 2, width, 0, device, from.data(), to.data(), overflows ? count : 96,
           overflows ? count + 2 : count);
    if (std::memcmp(from.data(), to.data(), count * sizeof(float)) != 0) {
      std::printf("differs from the reference\n");
    }
    return 0;
  }
  if (kind == "divergent_barrier") launch(divergent_kernel, 1, 32, 0, device, to.data());
  if (kind == "race") {
    launch(count_kernel, 1, width, 0, device, reinterpret_cast<int*>(to.data()), false);
  }
  if (kind == "unaligned") {
    launch(unaligned_kernel, 1, 1, 0, device, reinterpret_cast<const char*>(from.data()) + 4,
           reinterpret_cast<unsigned*>(to.data()));
  }
  return 0;
}
