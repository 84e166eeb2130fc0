// v <- beta2 v + (1-beta2) x^2, x <- x / (correction sqrt(v) + eps), and |x| of every matrix before
// it is rounded.
#pragma once

#include "../elementwise_moment.h"

#include "elementwise.h"

namespace orthonorm::cuda {

struct ElementwiseMomentOp {
  static constexpr int lists = 2;
  static constexpr unsigned reads = 0b11, writes = 0b11;
  static constexpr Measure measure = Measure::norm;
  template <class A>
  using Constants = ElementwiseMoment<A>;

  double beta2, eps;
  Number corrections;  // one for each item, or one for all

  template <class A>
  __device__ ElementwiseMoment<A> prepare(const Entry<2>& entry, int64_t) const {
    return {beta2, eps, corrections.read(entry.item)};
  }

  template <class A>
  __device__ static A apply(const ElementwiseMoment<A>& c, A (&x)[2], int64_t) {
    elementwise_moment(c, x[0], x[1]);
    return x[1];
  }
};

}  // namespace orthonorm::cuda
