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
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

#ifdef __CUDACC__
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            const Device& device, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (shared_bytes > 48 * 1024) {  // more than a launch gets unasked
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, device.stream>>>(arguments...);
  check(cudaGetLastError());
}
#endif

}  // namespace orthonorm::cuda
