// One element of `rotated_adam_`; torch-free.
#pragma once

#include <cmath>

#include "host_device.h"

namespace orthonorm {

// What is constant over one matrix. Made in double, converted once to the arithmetic of the matrix.
template <class A>
struct RotatedAdam {
  A beta1, gain1, beta2, gain2, eps, scale;

  ORTHONORM_HD RotatedAdam(double beta1, double beta2, double eps, double scale)
      : beta1(static_cast<A>(beta1)),
        gain1(static_cast<A>(1 - beta1)),
        beta2(static_cast<A>(beta2)),
        gain2(static_cast<A>(1 - beta2)),
        eps(static_cast<A>(eps)),
        scale(static_cast<A>(scale)) {}
};

// m <- beta1 m + (1-beta1) x, v <- beta2 v + (1-beta2) x^2, x <- scale m / (sqrt(v) + eps), and 0
// where that denominator is 0.
template <class A>
ORTHONORM_HD inline void rotated_adam(const RotatedAdam<A>& c, A& m, A& v, A& x) {
  m = std::fma(c.beta1, m, c.gain1 * x);
  v = std::fma(c.beta2, v, c.gain2 * x * x);
  const A denominator = std::sqrt(v) + c.eps;
  const A direction = m / denominator * c.scale;
  x = denominator == A(0) ? A(0) : direction;
}

}  // namespace orthonorm
