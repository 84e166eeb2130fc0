// x / d, with a d for every matrix of a batch, rounded once; 0 for d = 0.
#pragma once

#include <cfloat>

#include "elementwise.h"

namespace orthonorm::cuda {

struct Divisor {
  double d, inverse;
  bool odd;  // on the way to two bytes
};

struct DivideEachOp {
  static constexpr int lists = 2;
  static constexpr unsigned reads = 0b01, writes = 0b10;
  static constexpr Measure measure = Measure::nothing;
  template <class A>
  using Constants = Divisor;

  Number divisors;

  // The inverse of a denormal is kept finite, so that a zero over it is zero.
  template <class A>
  __device__ Divisor prepare(const Entry<2>& entry, int64_t matrix) const {
    const double d = divisors.read(matrix), inverse = 1 / d;
    const double finite = inverse > DBL_MAX ? DBL_MAX : inverse < -DBL_MAX ? -DBL_MAX : inverse;
    return {d, d == 0 ? 0 : finite, size_of(entry.type[1]) == 2};
  }

  template <class A>
  __device__ static A apply(const Divisor& c, A (&x)[2], int64_t) {
    if constexpr (sizeof(A) == 8) {
      x[1] = c.d == 0 ? 0 : x[0] / c.d;
    } else {  // in double by the inverse: a power of two in both cancels exactly
      const double quotient = c.d == 0 ? 0 : static_cast<double>(x[0]) * c.inverse;
      x[1] = c.odd ? to_odd(quotient) : static_cast<float>(quotient);
    }
    return x[1];
  }
};

}  // namespace orthonorm::cuda
