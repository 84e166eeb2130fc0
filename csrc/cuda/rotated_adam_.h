// m <- beta1 m + (1-beta1) x, v <- beta2 v + (1-beta2) x^2, x <- scale m / (sqrt(v) + eps).
#pragma once

#include "../rotated_adam.h"

#include "elementwise.h"

namespace orthonorm::cuda {

struct RotatedAdamOp {
  static constexpr int lists = 3;
  static constexpr unsigned reads = 0b111, writes = 0b111;
  static constexpr Measure measure = Measure::nothing;
  template <class A>
  using Constants = RotatedAdam<A>;

  double beta1, beta2, eps;
  Number scales;  // one for each item, or one for all

  template <class A>
  __device__ RotatedAdam<A> prepare(const Entry<3>& entry, int64_t) const {
    return {beta1, beta2, eps, scales.read(entry.item)};
  }

  template <class A>
  __device__ static A apply(const RotatedAdam<A>& c, A (&x)[3], int64_t) {
    rotated_adam(c, x[0], x[1], x[2]);
    return x[2];
  }
};

}  // namespace orthonorm::cuda
