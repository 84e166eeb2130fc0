// Second moments and norms per row and column: the loops over a matrix; torch-free.
//
// A is float or double, as the values lie in memory or scratch. Squares are added up in double, where
// squares of floats are exact; M, the type products are made in, is double unless the result is
// rounded to 16 bits: then one rounding is all the error there is, and the extra conversions hide
// behind the memory.
#pragma once

#include <cstdint>

#include "magnitude.h"
#include "moments.h"

// Input and output may be the same memory, element for element.
#if defined(__clang__)
#define ORTHONORM_SAME_OR_APART _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define ORTHONORM_SAME_OR_APART _Pragma("GCC ivdep")
#else
#define ORTHONORM_SAME_OR_APART
#endif

namespace orthonorm {

// The sum of interleaved sums, upper half onto lower half.
template <int64_t lanes>
inline double fold(double* sums) {
  if constexpr (lanes > 1) {
    for (int64_t lane = 0; lane < lanes / 2; ++lane) sums[lane] += sums[lane + lanes / 2];
    return fold<lanes / 2>(sums);
  }
  return sums[0];
}

// Sum of squares of floats: exact squares in 32 interleaved sums of double, then halves, the same
// order for every instruction set.
inline double sum_squares(const float* x, int64_t count) {
  constexpr int64_t lanes = 32;
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const double value = x[i + lane];
      sums[lane] += value * value;
    }
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) {
    const double value = x[i];
    sums[lane] += value * value;
  }
  return fold<lanes>(sums);
}

// sums_j += sum over R rows of x_rj^2, row after row.
template <int R, class A>
inline void add_squares(const A* const (&x)[R], int64_t count, double* sums) {
  for (int64_t j = 0; j < count; ++j) {
    double sum = sums[j];
    for (int r = 0; r < R; ++r) {
      const double value = x[r][j];
      sum += value * value;
    }
    sums[j] = sum;
  }
}

// The sums of `factored_moment_`: of x_rj^2, and of the same weighted by two numbers of each row.
struct WeightedSums {
  double *plain, *first, *second;
};

template <int R, class A>
inline void add_weighted_squares(const A* const (&x)[R], const double* first, const double* second,
                                 int64_t count, const WeightedSums& sums) {
  for (int64_t j = 0; j < count; ++j) {
    double plain = sums.plain[j], a = sums.first[j], b = sums.second[j];
    for (int r = 0; r < R; ++r) {
      const double value = x[r][j], square = value * value;
      plain += square;
      a += first[r] * square;
      b += second[r] * square;
    }
    sums.plain[j] = plain;
    sums.first[j] = a;
    sums.second[j] = b;
  }
}

// y_j = x_j factor.
template <class M, class A>
inline void scale(const A* x, double factor, int64_t count, A* y) {
  const M f = static_cast<M>(factor);
  ORTHONORM_SAME_OR_APART
  for (int64_t j = 0; j < count; ++j) y[j] = static_cast<A>(static_cast<M>(x[j]) * f);
}

// y_j = x_j factors_j.
template <class M, class A>
inline void scale_each(const A* x, const M* factors, int64_t count, A* y) {
  ORTHONORM_SAME_OR_APART
  for (int64_t j = 0; j < count; ++j) y[j] = static_cast<A>(static_cast<M>(x[j]) * factors[j]);
}

// y_j = x_j / divisors_j, and 0 where that is 0.
inline void divide_each(const double* x, const double* divisors, int64_t count, double* y) {
  ORTHONORM_SAME_OR_APART
  for (int64_t j = 0; j < count; ++j) y[j] = divisors[j] == 0 ? 0 : x[j] / divisors[j];
}

inline void divide(const double* x, double by, int64_t count, double* y) {
  ORTHONORM_SAME_OR_APART
  for (int64_t j = 0; j < count; ++j) y[j] = by == 0 ? 0 : x[j] / by;
}

// One row of `factored_moment_` where eps is small: y = x row columns_j (1 + linear t + quadratic t^2)
// with t = weight columns_j, or its square if `inside`.
struct NearRow {
  double row, weight, linear, quadratic;
  bool inside;
};

template <class A>
inline void scale_near(const A* x, const NearRow& c, const double* columns, int64_t count, A* y) {
  ORTHONORM_SAME_OR_APART
  for (int64_t j = 0; j < count; ++j) {
    const double z = c.weight * columns[j];
    const double t = c.inside ? z * z : z;
    const double factor = c.row * columns[j] * (1 + t * (c.linear + t * c.quadratic));
    y[j] = static_cast<A>(static_cast<double>(x[j]) * factor);
  }
}

// The same for any eps: `roots` is 1 / columns, `root` the row's, ratio multiplies the result.
struct FarRow {
  double root, ratio, eps;
};

template <EpsAt at>
inline double far_factor(double root, double eps) {
  double d;
  if constexpr (at == EpsAt::inside) {
    d = std::sqrt(root * root + eps);
  } else if constexpr (at == EpsAt::outside) {
    d = root + eps;
  } else {
    d = root < eps ? eps : root;
  }
  return inverse_or_zero(d);
}

template <EpsAt at, class A>
inline void scale_far(const A* x, const FarRow& c, const double* roots, int64_t count, A* y) {
  ORTHONORM_SAME_OR_APART
  for (int64_t j = 0; j < count; ++j) {
    const double factor = far_factor<at>(c.root * roots[j], c.eps) * c.ratio;
    y[j] = static_cast<A>(static_cast<double>(x[j]) * factor);
  }
}

// Sum of the squares that `scale_far` with ratio 1 would give, 8 interleaved sums.
template <EpsAt at, class A>
inline double sum_far(const A* x, const FarRow& c, const double* roots, int64_t count) {
  constexpr int64_t lanes = 8;
  double sums[lanes] = {};
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const double y = static_cast<double>(x[j + lane]) *
                       far_factor<at>(c.root * roots[j + lane], c.eps);
      sums[lane] += y * y;
    }
  }
  for (int64_t lane = 0; j < count; ++j, ++lane) {
    const double y = static_cast<double>(x[j]) * far_factor<at>(c.root * roots[j], c.eps);
    sums[lane] += y * y;
  }
  return fold<lanes>(sums);
}

}  // namespace orthonorm
