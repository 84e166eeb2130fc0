// Newton-Schulz on a single row or column, which it multiplies by a number; torch-free.
//
// X X^T is a number, so X <- (a + b |X|^2 + c |X|^4) X: two reads and a write at any length, where
// products took 16 times the memory and more (1 x 65536 float32 on two threads, 2026-11: 0.9 ms).
#pragma once

#include "small_newton_schulz_real.h"
#include "small_newton_schulz_scale.h"

namespace orthonorm::small {

// Sum of (x first second)^2, block after block: one sum of all would lose digits of float64.
template <class M, class In>
ORTHONORM_INLINE double row_squares(const In* x, int64_t count, const Divisor& d) {
  constexpr int64_t block = 4096;
  double sum = 0;
  for (int64_t i = 0; i < count; i += block) {
    sum += sum_squares<M>(x + i, 0, 1, count - i < block ? count - i : block, d);
  }
  return sum;
}

// f(s) / s for the composed polynomial f.
inline double multiplier(const Polynomial& p, double s) {
  double product = 1;
  for (int64_t t = 0; t < p.steps; ++t) {
    const double* const at = p.coefficients + 3 * t;
    const double square = s * s, factor = at[0] + square * (at[1] + square * at[2]);
    product *= factor;
    s *= factor;
  }
  return product;
}

// y = the polynomial of x, scaled; both contiguous, apart from each other.
template <class M, class In, class E>
ORTHONORM_INLINE void iterate_row(const In* x, int64_t count, const Scaling& scaling,
                                  const double* norm, const Polynomial& p, E* y) {
  const Divisor unit = unit_for(x, count, 1, count);
  const double length = std::sqrt(row_squares<M>(x, count, unit));
  const Divisor d = divisor_of(unit, length, scaling, norm);
  const double same_units = (d.first / unit.first) * (d.second / unit.second);
  const double factor = multiplier(p, length * same_units / d.by);
  if (d.by == 0) {
    for (int64_t i = 0; i < count; ++i) y[i] = E(0);
  } else if (sizeof(In) == 4) {
    const double by = factor / d.by;
    for (int64_t i = 0; i < count; ++i) y[i] = static_cast<E>(x[i] * by);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      y[i] = static_cast<E>(x[i] * d.first * d.second / d.by * factor);
    }
  }
}

}  // namespace orthonorm::small
