// <X, Y> of every pair of matrices of two lists.
#pragma once

#include "elementwise.h"

namespace orthonorm::cuda {

struct InnerOp {
  static constexpr int lists = 2;
  static constexpr unsigned reads = 0b11, writes = 0b00;
  static constexpr Measure measure = Measure::sum;
  template <class A>
  struct Constants {};

  template <class A>
  __device__ Constants<A> prepare(const Entry<2>&, int64_t) const {
    return {};
  }

  template <class A>
  __device__ static double apply(const Constants<A>&, A (&x)[2], int64_t) {
    return static_cast<double>(x[0]) * static_cast<double>(x[1]);
  }
};

}  // namespace orthonorm::cuda
