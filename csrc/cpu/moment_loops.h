// Second moments and norms per row and column: the loops over a run of values; torch-free.
//
// Values are float or double, as they lie in memory or in scratch. Squares are added up in double,
// where squares of floats are exact, in an order that is the same for every instruction set. M, the
// type products are made in, is double for what is stored as float or double: one rounding is then all
// the error there is, and the conversions hide behind the memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../magnitude.h"
#include "../moments.h"
#include "isa.h"

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

// Sum of squares, in 32 interleaved sums.
inline double sum_squares(const float* x, int64_t count) {
  constexpr int64_t lanes = 32;
  double result;
  specialized([=, &result] {
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
    result = fold<lanes>(sums);
  });
  return result;
}

inline SquareSum sum_squares(const double* x, int64_t count) {
  SquareSum sum;
  specialized([=, &sum] { sum = square_sum(x, count); });
  return sum;
}

// sums_j += sum over R runs of x_rj^2, run after run.
template <int R, class A>
inline void add_squares(const A* const (&runs)[R], int64_t count, double* sums) {
  struct {
    const A* run[R];
  } x;
  std::copy(runs, runs + R, x.run);
  specialized([=] {
    for (int64_t j = 0; j < count; ++j) {
      double sum = sums[j];
      for (int r = 0; r < R; ++r) {
        const double value = x.run[r][j];
        sum += value * value;
      }
      sums[j] = sum;
    }
  });
}

// The same, and weighted by two numbers of each run.
struct WeightedSums {
  double *plain, *first, *second;
};

template <int R, class A>
inline void add_weighted_squares(const A* const (&runs)[R], const double* first,
                                 const double* second, int64_t count, const WeightedSums& sums) {
  struct {
    const A* run[R];
    double first[R], second[R];
  } x;
  for (int r = 0; r < R; ++r) x.run[r] = runs[r], x.first[r] = first[r], x.second[r] = second[r];
  specialized([=] {
    double *const plain = sums.plain, *const once = sums.first, *const twice = sums.second;
    ORTHONORM_SAME_OR_APART
    for (int64_t j = 0; j < count; ++j) {
      double a = plain[j], b = once[j], c = twice[j];
      for (int r = 0; r < R; ++r) {
        const double value = x.run[r][j], square = value * value;
        a += square;
        b += x.first[r] * square;
        c += x.second[r] * square;
      }
      plain[j] = a;
      once[j] = b;
      twice[j] = c;
    }
  });
}

inline void add_to(double* sums, const double* more, int64_t count) {
  specialized([=] {
    for (int64_t j = 0; j < count; ++j) sums[j] += more[j];
  });
}

// Memory that will be read next: where it starts and its bytes for each element worked on now.
struct Ahead {
  const char* data = nullptr;
  int64_t size = 0;
};

// y_j = x_j factor, while what is ahead comes into the cache.
template <class M, class A>
inline void scale(const A* x, double factor, int64_t count, A* y, Ahead ahead = {}) {
  const M f = static_cast<M>(factor);
  specialized([=] {
    constexpr int64_t step = 256;
    for (int64_t i = 0; i < count; i += step) {
      const int64_t end = std::min(i + step, count);
      if (ahead.data != nullptr) {
        for (int64_t b = i * ahead.size; b < end * ahead.size; b += 64) {
          __builtin_prefetch(ahead.data + b);
        }
      }
      ORTHONORM_SAME_OR_APART
      for (int64_t j = i; j < end; ++j) y[j] = static_cast<A>(static_cast<M>(x[j]) * f);
    }
  });
}

// y_j = x_j factors_j.
template <class M, class A>
inline void scale_each(const A* x, const M* factors, int64_t count, A* y) {
  specialized([=] {
    ORTHONORM_SAME_OR_APART
    for (int64_t j = 0; j < count; ++j) y[j] = static_cast<A>(static_cast<M>(x[j]) * factors[j]);
  });
}

// y_j = x_j / by, and 0 for 0.
inline void divide(const double* x, double by, int64_t count, double* y) {
  specialized([=] {
    ORTHONORM_SAME_OR_APART
    for (int64_t j = 0; j < count; ++j) y[j] = by == 0 ? 0 : x[j] / by;
  });
}

inline void divide_each(const double* x, const double* by, int64_t count, double* y) {
  specialized([=] {
    ORTHONORM_SAME_OR_APART
    for (int64_t j = 0; j < count; ++j) y[j] = by[j] == 0 ? 0 : x[j] / by[j];
  });
}

// One run of `factored_moment_` where eps is small: y_j = x_j run columns_j f, with
// f = 1 + linear t + quadratic t^2, t = weight columns_j or its square.
struct NearRun {
  double run, weight, linear, quadratic;
};

template <bool square, class A>
inline void scale_near(const A* x, const NearRun& c, const double* columns, int64_t count, A* y) {
  specialized([=] {
    ORTHONORM_SAME_OR_APART
    for (int64_t j = 0; j < count; ++j) {
      const double z = c.weight * columns[j], t = square ? z * z : z;
      const double factor = c.run * columns[j] * (1 + t * (c.linear + t * c.quadratic));
      y[j] = static_cast<A>(static_cast<double>(x[j]) * factor);
    }
  });
}

// The same for any eps: y_j = x_j ratio / (root roots_j, with eps).
struct FarRun {
  double root, ratio, eps;
};

template <EpsAt at>
inline double far_factor(double root, double eps) {
  if constexpr (at == EpsAt::inside) return inverse_or_zero(std::sqrt(root * root + eps));
  if constexpr (at == EpsAt::outside) return inverse_or_zero(root + eps);
  return inverse_or_zero(root < eps ? eps : root);
}

template <EpsAt at, class A>
inline void scale_far(const A* x, const FarRun& c, const double* roots, int64_t count, A* y) {
  specialized([=] {
    ORTHONORM_SAME_OR_APART
    for (int64_t j = 0; j < count; ++j) {
      const double factor = far_factor<at>(c.root * roots[j], c.eps) * c.ratio;
      y[j] = static_cast<A>(static_cast<double>(x[j]) * factor);
    }
  });
}

// Sum of the squares that `scale_far` with ratio 1 would give, in 16 interleaved sums.
template <EpsAt at, class A>
inline double sum_far(const A* x, const FarRun& c, const double* roots, int64_t count) {
  constexpr int64_t lanes = 16;
  double result;
  specialized([=, &result] {
    double sums[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const double factor = far_factor<at>(c.root * roots[i + lane], c.eps);
        const double y = static_cast<double>(x[i + lane]) * factor;
        sums[lane] += y * y;
      }
    }
    for (int64_t lane = 0; i < count; ++i, ++lane) {
      const double y = static_cast<double>(x[i]) * far_factor<at>(c.root * roots[i], c.eps);
      sums[lane] += y * y;
    }
    result = fold<lanes>(sums);
  });
  return result;
}

}  // namespace orthonorm
