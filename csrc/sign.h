// The sign of one element; torch-free.
#pragma once

#include "host_device.h"

namespace orthonorm {

// 0 of 0, and NaN where x is not finite.
template <class A>
ORTHONORM_HD inline A sign_or_nan(A x) {
  const A one = x > 0 ? A(1) : A(0);
  return (x < 0 ? A(-1) : one) + (x - x);
}

}  // namespace orthonorm
