// |X| of every matrix of a list.
#pragma once

#include "elementwise.h"

namespace orthonorm::cuda {

struct MagnitudeOp {
  static constexpr int lists = 1;
  static constexpr unsigned reads = 0b1, writes = 0b0;
  static constexpr Measure measure = Measure::norm;
  template <class A>
  struct Constants {};

  template <class A>
  __device__ Constants<A> prepare(const Entry<1>&, int64_t) const {
    return {};
  }

  template <class A>
  __device__ static A apply(const Constants<A>&, A (&x)[1], int64_t) {
    return x[0];
  }
};

}  // namespace orthonorm::cuda
