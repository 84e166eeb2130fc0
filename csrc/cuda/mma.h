// Products of 16 x 8 x 16 on tensor cores (sm_80 and later) and the loads that feed them.
//
// Fragments as the PTX ISA has them ("mma.m16n8k16", "ldmatrix"): of a 16 x 16 left factor a lane
// holds four pairs, of a 16 x 8 right factor two, of the 16 x 8 sums four floats. All lanes of a
// warp call these together. Tests run the same kernels with the layouts spelled out on the CPU.
#pragma once

#include "elements.h"

#ifndef __CUDACC__
#include <mma_on_cpu.h>
#else

namespace orthonorm::cuda {

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lanes 8 i to 8 i + 7 say where the rows
// of matrix i begin, 16 bytes each. A lane gets the pair of row lane / 4 at column 2 (lane % 4).
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at)
               : "memory");
}

// The same of the matrices' transposes.
__device__ inline void load_transposes(uint32_t (&to)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at)
               : "memory");
}

// sums += left right, in float.
template <class T>
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0,
                                    uint32_t right1) {
#define ORTHONORM_MMA(type)                                                       \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "              \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                \
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1))
  if constexpr (std::is_same_v<T, Fp16>) {
    ORTHONORM_MMA("f16");
  } else {
    ORTHONORM_MMA("bf16");
  }
#undef ORTHONORM_MMA
}

}  // namespace orthonorm::cuda

#endif
