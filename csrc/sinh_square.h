// Sums of sinh(x / d)^2, in an order fixed by their number; torch-free.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "elements.h"

namespace orthonorm {

// sinh(y)^2 of z = y^2 by its series, sum_k 2^(2k-1) z^k / (2k)!. What is left out is below 2^-56
// of it for |y| <= series_end.
inline constexpr double series_end = 0.375;
ORTHONORM_HD inline double sinh_square(double z) {
  double p = 0x1p15 / 20922789888000;
  p = std::fma(p, z, 0x1p13 / 87178291200);
  p = std::fma(p, z, 0x1p11 / 479001600);
  p = std::fma(p, z, 0x1p9 / 3628800);
  p = std::fma(p, z, 0x1p7 / 40320);
  p = std::fma(p, z, 0x1p5 / 720);
  p = std::fma(p, z, 0x1p3 / 24);
  return std::fma(p * z, z, z);
}

// The largest magnitude; NaN if there is one.
template <class A>
inline A peak_of(const A* x, int64_t count) {
  using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  constexpr Bits magnitude = static_cast<Bits>(~(Bits{1} << (8 * sizeof(Bits) - 1)));
  Bits peak = 0;  // magnitudes order like their bits, which the compiler can vectorize
  for (int64_t i = 0; i < count; ++i) peak = std::max(peak, bit_cast<Bits>(x[i]) & magnitude);
  return bit_cast<A>(peak);
}

// Sum of sinh(x_i / d)^2, with 0 for x / 0. Where an x / d is beyond the series, the library's sinh
// serves: of what AuON measures hardly ever.
template <class A>
inline double sum_of_sinh_squares(const A* x, double d, int64_t count) {
  const double inverse = 1 / d, size = std::abs(d);
  const bool normal = size >= 0x1p-1000 && (size <= 0x1p1000 || inverse == 0);
  if (!normal || !(static_cast<double>(peak_of(x, count)) * std::abs(inverse) <= series_end)) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double s = d == 0 ? 0.0 : std::sinh(static_cast<double>(x[i]) / d);
      sum = std::fma(s, s, sum);
    }
    return sum;
  }
  constexpr int64_t lanes = 64;
  double sums[lanes] = {};
  const auto add = [=](double value, double& sum) {
    const double y = value * inverse;
    sum += sinh_square(y * y);
  };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      add(static_cast<double>(x[i + lane]), sums[lane]);
    }
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) add(static_cast<double>(x[i]), sums[lane]);
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

}  // namespace orthonorm
