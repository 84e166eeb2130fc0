// X <- a X + (b A + c A^2) X with A = X X^T, a matrix in each block: device part and launches.
#pragma once

#include "small_lists.h"

namespace orthonorm::cuda {

// What precedes the polynomial: X / (safety max(|X|_F, eps)), or X / safety.
struct SmallScaling {
  bool scale;
  double eps, safety;
  bool known;  // norms are given
  Number norms;
};

// |x|_F for every thread, squares of floats added in double in one order.
template <class S>
__device__ inline double norm_of(const SmallView& x) {
  ORTHONORM_SHARED(double, norm, 1);
  Adder<Measure::norm, float> squares;
  x.each_run<S::threads>([&](int line, int at) {
    float values[8];
    x.load(line, at, values);
#pragma unroll
    for (int k = 0; k < 8; ++k) squares.add(values[k]);
  });
  const double sum = block_sum<S::threads>(squares.sum);
  if (threadIdx.x == 0) *norm = std::sqrt(sum);
  __syncthreads();
  return *norm;
}

// What x is multiplied by; 0 for a divisor of 0, NaN for one that is no number.
template <class S>
__device__ inline double factor_of(const SmallView& x, const SmallScaling& s, int64_t place) {
  double divisor = s.safety;
  if (s.scale) {
    const double norm = s.known ? s.norms.read(place) : norm_of<S>(x);
    divisor *= norm < s.eps ? s.eps : norm;
  }
  // An eps below what numbers of x can be must not make infinity of their zeros' factor.
  return divisor == 0 ? 0 : 1 / (divisor < 1e-300 ? 1e-300 : divisor);
}

template <class S>
__global__ void __launch_bounds__(S::threads)
    small_newton_schulz_kernel(ORTHONORM_CONSTANT(SmallTable) table,
                               ORTHONORM_CONSTANT(SmallPolynomial) polynomial,
                               SmallScaling scaling) {
  using T = typename S::T;
  ORTHONORM_DYNAMIC_SHARED(T, memory);
  const SmallEntry& entry = locate<&SmallEntry::first_block>(table, blockIdx.x);
  const int64_t b = blockIdx.x - entry.first_block;
  const int columns = S::columns(entry.columns), ld = columns + 8;
  T *const A = memory, *const X = memory + S::side * S::ld;
  {
    const SmallView x(entry.x, entry.x_stride, b, entry);
    clear<S>(X, ld);
    fetch<S>(X, ld, x, factor_of<S>(x, scaling, entry.place + b));
  }
#pragma unroll 1
  for (int t = 0; t < polynomial.iterations; ++t) {
    const float* const abc = polynomial.coefficients + 3 * t;
    const float b1 = abc[1], c = abc[2];
    symmetric_sum<S, T>(A, nullptr, X, X, ld, columns, c == 0 ? b1 : 1, 0);
    if (c != 0) symmetric_sum<S, T>(A, A, A, A, S::ld, S::side, c, b1);
    apply<S, T>(X, ld, columns, A, abc[0]);
  }
  deliver<S>(X, ld, SmallView(entry.out, entry.out_stride, b, entry));
}

template <class T>
SmallLists small_newton_schulz_lists(const Device& device, const SmallPolynomial& polynomial,
                                     const SmallScaling& scaling) {
  return SmallLists([=, &device](const SmallTable& table, int size) {
    with_size<T>(size, [&]<class S>() {
      const int ld = S::columns(table.columns) + 8;
      launch(small_newton_schulz_kernel<S>, table.matrices, S::threads,
             S::square_bytes + S::side * ld * 2, device, table, polynomial, scaling);
    });
  });
}

}  // namespace orthonorm::cuda
