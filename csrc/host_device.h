// ORTHONORM_HD marks a formula for CPU and GPU; a plain C++ compiler sees nothing. Torch-free.
//
// Formulas write std::fma where they want it. Left to the compiler, a vectorized loop and its
// remainder fused different products, so that an element's result depended on its place (GCC 12,
// 2026-11); with it, results are the same bits at any place and on any instruction set.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define ORTHONORM_HD __host__ __device__
#else
#define ORTHONORM_HD
#endif
