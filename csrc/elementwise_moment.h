// One element of `elementwise_moment_`; torch-free.
#pragma once

#include <cmath>

#include "host_device.h"

namespace orthonorm {

// What is constant over one matrix. Made in double, converted once to the arithmetic of the matrix.
template <class A>
struct ElementwiseMoment {
  A beta2, gain2, eps, correction;

  ORTHONORM_HD ElementwiseMoment(double beta2, double eps, double correction)
      : beta2(static_cast<A>(beta2)),
        gain2(static_cast<A>(1 - beta2)),
        eps(static_cast<A>(eps)),
        correction(static_cast<A>(correction)) {}
};

// v <- beta2 v + (1-beta2) x^2, x <- x / (correction sqrt(v) + eps), and 0 where that is 0.
template <class A>
ORTHONORM_HD inline void elementwise_moment(const ElementwiseMoment<A>& c, A& v, A& x) {
  v = std::fma(c.beta2, v, c.gain2 * x * x);
  const A denominator = std::fma(c.correction, std::sqrt(v), c.eps);
  x = denominator == A(0) ? A(0) : x / denominator;
}

}  // namespace orthonorm
