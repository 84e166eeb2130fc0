// Q with Q X = p(X) for R = X X^T, all of a small R's chain in one block: device part and launches.
#pragma once

#include "small_lists.h"

namespace orthonorm::cuda {

//   Z = b R + c R^2;  Q <- a Q + Q Z;  W = a R + R Z;  R <- a W + W Z
// by `sum(to, left, right, alpha, beta)`, to = alpha left right + beta left. W replaces R where Z
// is another matrix; where c = 0, Z means b R and W has its place.
template <class T, class Sum>
__device__ inline void gram_iterations(T* R, T* Q, T* Z, const SmallPolynomial& polynomial,
                                       const Sum& sum) {
#pragma unroll 1
  for (int t = 0; t < polynomial.iterations; ++t) {
    const float* const abc = polynomial.coefficients + 3 * t;
    const float a = abc[0], b1 = abc[1], c = abc[2];
    const bool square = c != 0, last = t + 1 == polynomial.iterations;
    const T* const z = square ? Z : R;
    T* const W = square ? R : Z;
    const float factor = square ? 1 : b1;
#pragma unroll 1
    for (int product = square ? 0 : 1; product < (last ? 2 : 4); ++product) {  // one copy of code
      T* const to = product == 0 ? Z : product == 1 ? Q : product == 2 ? W : R;
      const T* const left = product == 1 ? Q : product == 3 ? W : R;
      const float alpha = product == 0 ? c : factor, beta = product == 0 ? b1 : a;
      sum(to, left, product == 0 ? R : z, alpha, beta);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    small_gram_polynomial_kernel(ORTHONORM_CONSTANT(SmallTable) table,
                                 ORTHONORM_CONSTANT(SmallPolynomial) polynomial) {
  using T = typename S::T;
  ORTHONORM_DYNAMIC_SHARED(T, memory);
  const SmallEntry& entry = locate<&SmallEntry::first_block>(table, blockIdx.x);
  const int64_t b = blockIdx.x - entry.first_block;
  T *const R = memory, *const Q = R + S::side * S::ld, *const Z = Q + S::side * S::ld;
  clear<S>(R, S::ld);
  clear<S>(Q, S::ld);
  fetch<S>(R, S::ld, SmallView(entry.x, entry.x_stride, b, entry), 1.0);
  for (int i = threadIdx.x; i < entry.rows; i += S::threads) Q[i * S::ld + i] = rounded<T>(1.0f);
  __syncthreads();
  gram_iterations(R, Q, Z, polynomial,
                  [&](T* to, const T* left, const T* right, float alpha, float beta) {
                    symmetric_sum<S, T>(to, left, left, right, S::ld, S::side, alpha, beta);
                  });
  deliver<S>(Q, S::ld, SmallView(entry.out, entry.out_stride, b, entry));
}

template <class T>
void launch_small_gram_polynomial(const SmallTable& table, int size,
                                  const SmallPolynomial& polynomial, const Device& device) {
  with_size<T>(size, [&]<class S>() {
    static_assert(3 * S::square_bytes <= 104448);  // CHAIN_BYTES of ops/words.py, its predicate
    launch(small_gram_polynomial_kernel<S>, table.matrices, S::threads, 3 * S::square_bytes, device,
           table, polynomial);
  });
}

}  // namespace orthonorm::cuda
