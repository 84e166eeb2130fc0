// Second moments and norms per row and column: the rules for one number; torch-free.
#pragma once

#include <cfloat>
#include <cmath>

#include "host_device.h"

namespace orthonorm {

// Where a denominator meets eps, with s the root: s + eps, sqrt(s^2 + eps), max(s, eps).
enum class EpsAt { outside, inside, clamp };

// 1 / d, and 0 for d = 0. Never infinite, so that the zeros of a vanishing row stay zeros.
ORTHONORM_HD inline double inverse_or_zero(double d) {
  const double inverse = 1 / d;
  return d == 0 ? 0 : inverse > DBL_MAX ? DBL_MAX : inverse;
}

// A NaN root stays one: comparisons with it are false.
ORTHONORM_HD inline double denominator(double mean_square, double eps, EpsAt at) {
  if (at == EpsAt::inside) return std::sqrt(mean_square + eps);
  const double root = std::sqrt(mean_square);
  if (at == EpsAt::outside) return root + eps;
  return root < eps ? eps : root;
}

// What `row_normalize` and `column_normalize` divide by.
ORTHONORM_HD inline double divisor(double norm, double eps, EpsAt at) {
  if (at == EpsAt::inside) return std::hypot(norm, std::sqrt(eps));
  if (at == EpsAt::outside) return norm + eps;
  return norm < eps ? eps : norm;
}

ORTHONORM_HD inline double decayed(double moment, double mean_square, double beta2) {
  return beta2 * moment + (1 - beta2) * mean_square;
}

// A sum with what rounding took from it (Kahan): of a few hundred squares a plain one loses enough
// for float64 to show it in every element of a matrix that is rescaled (2026-11).
struct CarefulSum {
  double sum = 0, lost = 0;

  ORTHONORM_HD void add(double x) {
    const double term = x - lost, next = sum + term;
    const double rest = (next - sum) - term;
    lost = rest == rest ? rest : 0;  // an infinite sum stays infinite
    sum = next;
  }
};

// |X| / |X^| from both sums of squares; a zero X^ stays zero.
ORTHONORM_HD inline double norm_ratio(double before, double after) {
  return after == 0 ? 0 : std::sqrt(before) / std::sqrt(after);
}

// `factored_moment_` divides x_ij by the root of V_ij = r_i c_j / mean(r), with eps. In terms of
// y = 1 / sqrt(V_ij), the product of a row's and a column's number, the factor is y f(t) with
//   outside: f = 1 / (1 + t),       t = eps y
//   inside:  f = 1 / sqrt(1 + t),   t = eps y^2
//   clamp:   f = 1 while eps y <= 1.
// For small t a polynomial in t serves: no division and no root an element, and a squared norm that
// is a sum over columns of sums over rows, so that it needs no pass over X of its own.
struct NearFactor {
  double linear, quadratic;  // f = 1 + linear t + quadratic t^2, error below t^3
  double norm_linear;        // f^2 = 1 - norm_linear t, error below 1.5 norm_linear t^2

  ORTHONORM_HD explicit NearFactor(EpsAt at)
      : linear(at == EpsAt::outside ? -1 : at == EpsAt::inside ? -0.5 : 0),
        quadratic(at == EpsAt::outside ? 1 : at == EpsAt::inside ? 0.375 : 0),
        norm_linear(at == EpsAt::outside ? 2 : at == EpsAt::inside ? 1 : 0) {}
};

}  // namespace orthonorm
