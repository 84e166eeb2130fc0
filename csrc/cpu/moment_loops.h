// Second moments and norms per row and column: the loops over a run of values; torch-free.
//
// Values are float or double, as they lie in memory or in scratch. Squares are added up in double,
// where squares of floats are exact, in an order that is the same for every instruction set. M, the
// type products are made in, is double for what is stored as float or double: one rounding is then all
// the error there is, and the conversions hide behind the memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

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

// Eight values as doubles. Loops that only read are written with these, so that memory is read line
// after line: what GCC 12 makes of plain loops skips to and fro, which no hardware prefetcher follows
// (row sums of 340 MB on one thread, 2026-11: 19.4 ms; so 11.4 ms; plain reading 9.6 ms).
using Eight = double __attribute__((vector_size(64)));

inline void load_eight(const float* x, Eight& v) {
  float __attribute__((vector_size(32))) narrow;
  std::memcpy(&narrow, x, sizeof(narrow));
  v = __builtin_convertvector(narrow, Eight);
}
inline void load_eight(const double* x, Eight& v) { std::memcpy(&v, x, sizeof(v)); }

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
  double result;
  specialized([=, &result] {
    Eight sums[4] = {}, v;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      for (int64_t k = 0; k < 4; ++k) {
        load_eight(x + i + 8 * k, v);
        sums[k] += v * v;
      }
    }
    double lanes[32];
    std::memcpy(lanes, sums, sizeof(lanes));
    for (int64_t lane = 0; i < count; ++i, ++lane) {
      const double value = x[i];
      lanes[lane] += value * value;
    }
    result = fold<32>(lanes);
  });
  return result;
}

// float64, to which squares may be too large or too small.
inline SquareSum sum_squares(const double* x, int64_t count) {
  SquareSum sum;
  specialized([=, &sum] { sum = square_sum(x, count); });
  return sum;
}

// R runs of values, and how many bytes behind each of them lies what will be read next (0: unknown).
// Several runs side by side are too many for the hardware prefetcher: column sums of 340 MB on one
// thread, 4 runs at a time, take 19 ms without and 12 ms with it done by hand (2026-11).
template <int R, class A>
struct Rows {
  const A* at[R];
  int64_t ahead = 0;

  void prefetch(int r, int64_t j) const {
    if (ahead != 0) __builtin_prefetch(reinterpret_cast<const char*>(at[r] + j) + ahead);
  }
};

// sums_j += sum over the rows of x_rj^2, row after row.
template <int R, class A>
inline void add_squares(const Rows<R, A>& x, int64_t count, double* sums) {
  specialized([=] {
    int64_t j = 0;
    for (; j + 8 <= count; j += 8) {
      Eight sum, v;
      load_eight(sums + j, sum);
      for (int r = 0; r < R; ++r) {
        if (j * sizeof(A) % 64 == 0) x.prefetch(r, j);
        load_eight(x.at[r] + j, v);
        sum += v * v;
      }
      std::memcpy(sums + j, &sum, sizeof(sum));
    }
    for (; j < count; ++j) {
      for (int r = 0; r < R; ++r) {
        const double value = x.at[r][j];
        sums[j] += value * value;
      }
    }
  });
}

// The same, and weighted by two numbers of each row.
struct WeightedSums {
  double *plain, *first, *second;
};

template <int R>
struct Weights {
  double first[R], second[R];
};

template <int R, class A>
inline void add_weighted_squares(const Rows<R, A>& x, const Weights<R>& weights, int64_t count,
                                 const WeightedSums& sums) {
  specialized([=] {
    int64_t j = 0;
    for (; j + 8 <= count; j += 8) {
      Eight plain, first, second, v;
      load_eight(sums.plain + j, plain);
      load_eight(sums.first + j, first);
      load_eight(sums.second + j, second);
      for (int r = 0; r < R; ++r) {
        if (j * sizeof(A) % 64 == 0) x.prefetch(r, j);
        load_eight(x.at[r] + j, v);
        v *= v;
        plain += v;
        first += weights.first[r] * v;
        second += weights.second[r] * v;
      }
      std::memcpy(sums.plain + j, &plain, sizeof(plain));
      std::memcpy(sums.first + j, &first, sizeof(first));
      std::memcpy(sums.second + j, &second, sizeof(second));
    }
    for (; j < count; ++j) {
      for (int r = 0; r < R; ++r) {
        const double value = x.at[r][j], square = value * value;
        sums.plain[j] += square;
        sums.first[j] += weights.first[r] * square;
        sums.second[j] += weights.second[r] * square;
      }
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

// Calls f(i, end) for pieces of [0, count), before each of which a piece of `ahead` is fetched.
template <class F>
inline void in_pieces(int64_t count, const Ahead& ahead, const F& f) {
  constexpr int64_t piece = 256;
  for (int64_t i = 0; i < count; i += piece) {
    const int64_t end = std::min(i + piece, count);
    for (int64_t b = i * ahead.size; b < end * ahead.size; b += 64) {
      __builtin_prefetch(ahead.data + b);
    }
    f(i, end);
  }
}

// y_j = x_j factor, while what is ahead comes into the cache.
template <class M, class A>
inline void scale(const A* x, double factor, int64_t count, A* y, Ahead ahead = {}) {
  const M f = static_cast<M>(factor);
  specialized([=] {
    in_pieces(count, ahead, [=](int64_t i, int64_t end) {
      ORTHONORM_SAME_OR_APART
      for (int64_t j = i; j < end; ++j) y[j] = static_cast<A>(static_cast<M>(x[j]) * f);
    });
  });
}

// y_j = x_j factors_j.
template <class M, class A>
inline void scale_each(const A* x, const M* factors, int64_t count, A* y, Ahead ahead = {}) {
  specialized([=] {
    in_pieces(count, ahead, [=](int64_t i, int64_t end) {
      ORTHONORM_SAME_OR_APART
      for (int64_t j = i; j < end; ++j) y[j] = static_cast<A>(static_cast<M>(x[j]) * factors[j]);
    });
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

// One run of `factored_moment_` where eps is small: y_j = x_j c_j (a + b z + c z^2), with z = c_j or
// c_j^2 and c the columns' numbers.
struct NearRun {
  double a, b, c;
};

template <bool square, class A>
inline void scale_near(const A* x, const NearRun& run, const double* columns, int64_t count, A* y,
                       Ahead ahead = {}) {
  specialized([=] {
    in_pieces(count, ahead, [=](int64_t i, int64_t end) {
      ORTHONORM_SAME_OR_APART
      for (int64_t j = i; j < end; ++j) {
        const double z = square ? columns[j] * columns[j] : columns[j];
        const double factor = columns[j] * (run.a + z * (run.b + z * run.c));
        y[j] = static_cast<A>(static_cast<double>(x[j]) * factor);
      }
    });
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
