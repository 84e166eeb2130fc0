// What kernels are written in: CUDA C++ under nvcc, the emulation of it in tests; torch-free.
//
// Nothing else asks which of the two compiles it. Kernels are launched by `launch`, as plain C++
// compilers know no <<<>>>; memory that a launch shares is `scratch` of the `Device`.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// The parameter of a kernel that lies in constant memory; shared memory of a fixed size; shared
// memory of the size the launch gives.
#define ORTHONORM_CONSTANT(...) const __grid_constant__ __VA_ARGS__
#define ORTHONORM_SHARED(type, name, count)                                       \
  __shared__ __align__(16) unsigned char name##_bytes[(count) * sizeof(type)];    \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#define ORTHONORM_DYNAMIC_SHARED(type, name)                     \
  extern __shared__ __align__(16) unsigned char name##_bytes[];  \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#else
#include <cuda_on_cpu.h>
#endif

namespace orthonorm::cuda {

// Where a list of launches runs, and memory of theirs that lives until they are done.
struct Device {
  cudaStream_t stream;
  std::function<void*(int64_t bytes)> allocate;

  template <class T>
  T* scratch(int64_t count) const {
    return static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))));
  }
};

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it: else the next launch of anybody would be blamed for it
  throw std::runtime_error(cudaGetErrorString(error));
}

#ifdef __CUDACC__
// Lets a kernel have `bytes` of dynamic shared memory on the current device: unasked, that and the
// kernel's arrays of fixed size get 48 KiB together. All that the device has is asked for, whatever
// `bytes`: threads that launch one kernel with different sizes would lower each other's limit.
inline void allow_shared(const void* kernel, int64_t bytes) {
  if (bytes == 0) return;
  cudaFuncAttributes has{};
  check(cudaFuncGetAttributes(&has, kernel));
  const int own = static_cast<int>(has.sharedSizeBytes);
  if (own + bytes <= has.maxDynamicSharedSizeBytes) return;
  int device = 0, most = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - own));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            const Device& device, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) check(cudaErrorInvalidConfiguration);
  allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, device.stream>>>(arguments...);
  check(cudaGetLastError());
}

// Every `cluster` consecutive blocks run at once, near each other (sm_90 and later).
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int cluster, int64_t blocks, int threads,
                     int64_t shared_bytes, const Device& device, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) check(cudaErrorInvalidConfiguration);
  allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = device.stream;
  config.attrs = &attribute, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// In a kernel for clusters, called first: on older architectures no code follows it.
__device__ inline int rank_in_cluster() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  __trap();
  __builtin_unreachable();
#endif
}

// All threads of the cluster are here, and see what the others have written.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#endif
}

// What lies at `own` in this block's dynamic shared memory, in the block of that rank.
template <class T>
__device__ inline T* of_rank(T* own, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(own, static_cast<unsigned>(rank)));
#else
  return own;
#endif
}
#endif

}  // namespace orthonorm::cuda
