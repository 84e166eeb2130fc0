// Sums of squares that neither overflow nor vanish, in an order fixed by their number; torch-free.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "elements.h"

namespace orthonorm {

// 2^exponent, for exponents from -1022 to 1023.
ORTHONORM_HD inline double power_of_two(int64_t exponent) {
  return bit_cast<double>(static_cast<uint64_t>(1023 + exponent) << 52);
}

// sum * 4^exponent. A power of two in the data moves to the exponent unrounded, so it moves the
// norm by exactly itself.
struct SquareSum {
  static constexpr int64_t lowest = -1000, highest = 1000;  // 2^exponent and 2^-exponent: normal
  double sum = 0;
  int64_t exponent = lowest;

  ORTHONORM_HD double norm() const { return std::sqrt(sum) * power_of_two(exponent); }
};

ORTHONORM_HD inline SquareSum operator+(const SquareSum& a, const SquareSum& b) {
  const bool less = a.exponent < b.exponent;  // no references: they would put both into memory
  const double large = less ? b.sum : a.sum, small = less ? a.sum : b.sum;
  const int64_t exponent = less ? b.exponent : a.exponent;
  const int64_t shift = 2 * ((less ? a.exponent : b.exponent) - exponent);
  return {large + small * power_of_two(shift < -1022 ? -1022 : shift), exponent};
}

// The exponent that brings the largest magnitude near 1; 0 if there is an infinity or a NaN.
inline int64_t peak_exponent(const double* x, int64_t count) {
  int64_t peak = 0;  // magnitudes order like their bits, which the compiler can vectorize
  for (int64_t i = 0; i < count; ++i) {
    peak = std::max(peak, std::bit_cast<int64_t>(x[i]) & INT64_MAX);
  }
  const int64_t biased = peak >> 52;
  return biased == 2047 ? 0 : std::clamp(biased - 1022, SquareSum::lowest, SquareSum::highest);
}

// Sum of x_i^2. float: exact squares summed in double, exponent 0. double: measured against the
// peak. 64 interleaved sums, then halves: the same order for every instruction set.
template <class A>
inline SquareSum square_sum(const A* x, int64_t count) {
  constexpr bool wide = sizeof(A) == 8;
  constexpr int64_t lanes = 64;
  int64_t exponent = 0;
  if constexpr (wide) exponent = peak_exponent(x, count);
  const double unit = power_of_two(-exponent);
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const double value = wide ? x[i + lane] * unit : static_cast<double>(x[i + lane]);
      sums[lane] += value * value;
    }
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) {
    const double value = wide ? x[i] * unit : static_cast<double>(x[i]);
    sums[lane] += value * value;
  }
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return {sums[0], exponent};
}

}  // namespace orthonorm
