// Runs of values times their factors: the loops behind row, column and factored moments;
// torch-free.
//
// Values are read and written as they lie in memory, in any of the four formats. A product is
// rounded to float or double once, and from there to a 16-bit format.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../elements.h"
#include "../moments.h"
#include "isa.h"
#include "square_sums.h"

// Input and output may be the same memory, element for element.
#if defined(__clang__)
#define ORTHONORM_SAME_OR_APART _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define ORTHONORM_SAME_OR_APART _Pragma("GCC ivdep")
#else
#define ORTHONORM_SAME_OR_APART
#endif

namespace orthonorm {

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
      prefetch_l2(ahead.data + b);
    }
    f(i, end);
  }
}

// A factor as the sum of two floats, which is good to 48 bits: floats are multiplied by it without
// leaving float. Twice the conversions between float and double made the same pass over 340 MB take
// 1.8 times as long as its memory (2026-11).
struct Split {
  float high, low;

  explicit Split(double factor)
      : high(static_cast<float>(factor)), low(static_cast<float>(factor - high)) {}
  Split(float high, float low) : high(high), low(low) {}

  // Whether both parts hold it.
  static bool fits(double factor) {
    const double size = std::abs(factor);
    return (size == 0) | ((size >= 0x1p-100) & (size <= FLT_MAX));
  }
};

struct Splits {
  const float *high, *low;

  Split operator[](int64_t j) const { return {high[j], low[j]}; }
};

// x factor, rounded once. A Split may make NaN of an infinite x.
inline float times(float x, const Split& f) { return __builtin_fmaf(x, f.high, x * f.low); }
inline float times(float x, double factor) { return static_cast<float>(x * factor); }
inline double times(double x, double factor) { return x * factor; }

// y_j = x_j factor, while what is ahead comes into the cache.
template <class T, class F>
inline void scale(const T* x, const F factor, int64_t count, T* y, Ahead ahead = {}) {
  specialized([=] {
    in_pieces(count, ahead, [=](int64_t i, int64_t end) {
      ORTHONORM_SAME_OR_APART
      for (int64_t j = i; j < end; ++j) narrow(times(widen(x[j]), factor), y[j]);
    });
  });
}

// The same, and the sum of squares of another run: in one loop the one's reads from memory go on
// beside the other's stores. Together 8.2 ms for 340 MB where a copy takes 8.0, one after the other
// 11.4 (Zen 5, 2026-11). A page at a time, so that both are streams to a prefetcher: on one
// thread of Zen 4 170 MB took 14.7 ms 1 KB at a time, and 11.0 (768 columns) or 14.1 (3072) so,
// where a copy takes 11.5 (2026-11).
template <class T, class F>
inline double scale_and_sum(const T* x, const F factor, int64_t count, T* y,
                            const Rows<1, T>& next) {
  double result;
  specialized([=, &result]<Isa set>(For<set>) {
    constexpr int64_t piece = 1024;
    Eight sums[4] = {};
    for (int64_t i = 0; i < count; i += piece) {
      const int64_t end = std::min(i + piece, count);
      add_run<set>(next, i, end, sums);
      ORTHONORM_SAME_OR_APART
      for (int64_t j = i; j < end; ++j) narrow(times(widen(x[j]), factor), y[j]);
    }
    result = finish_run(next, count, sums);
  });
  return result;
}

// y_j = x_j factors_j; Splits or doubles.
template <class T, class F>
inline void scale_each(const T* x, const F factors, int64_t count, T* y, Ahead ahead = {}) {
  specialized([=] {
    in_pieces(count, ahead, [=](int64_t i, int64_t end) {
      ORTHONORM_SAME_OR_APART
      for (int64_t j = i; j < end; ++j) narrow(times(widen(x[j]), factors[j]), y[j]);
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

// One run of `factored_moment_` where eps is small: y_j = x_j row c_j (1 + linear t + quadratic
// t^2) with t = eps z, where z = c_j or c_j^2 and c are the columns' numbers.
struct NearRun {
  double row, eps, linear, quadratic;
};

template <bool square, class T>
inline void scale_near(const T* x, const NearRun& run, const double* columns, int64_t count, T* y,
                       Ahead ahead = {}) {
  specialized([=] {
    in_pieces(count, ahead, [=](int64_t i, int64_t end) {
      ORTHONORM_SAME_OR_APART
      for (int64_t j = i; j < end; ++j) {
        const double t = run.eps * (square ? columns[j] * columns[j] : columns[j]);
        const double factor = run.row * columns[j] * (1 + t * (run.linear + run.quadratic * t));
        narrow(times(widen(x[j]), factor), y[j]);
      }
    });
  });
}

// In float, as a Split again: row c_j is `head` and what rounding took from it, to which what lies
// behind the first floats of row and c_j and what the polynomial adds come by a fused product each.
// Nine products an element: with 16 a cycle 6.6 ms of a core of Zen 4 for 170 MB, which take 4.3
// from the last-level cache (2026-11).
template <bool square, class T>
inline void scale_near(const T* x, const NearRun& run, const Splits& columns, int64_t count, T* y,
                       Ahead ahead = {}) {
  const Split row(run.row);
  const float eps = static_cast<float>(run.eps);
  const float linear = static_cast<float>(run.row * run.linear);
  const float quadratic = static_cast<float>(run.row * run.quadratic);
  specialized([=] {
    in_pieces(count, ahead, [=](int64_t i, int64_t end) {
      ORTHONORM_SAME_OR_APART
      for (int64_t j = i; j < end; ++j) {
        const float c = columns.high[j], head = c * row.high, t = eps * (square ? c * c : c);
        const float rest = __builtin_fmaf(__builtin_fmaf(quadratic, t, linear), t, row.low);
        const float lost = __builtin_fmaf(c, row.high, -head);
        const float low = __builtin_fmaf(c, rest, __builtin_fmaf(columns.low[j], row.high, lost));
        narrow(times(widen(x[j]), Split(head, low)), y[j]);
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

template <EpsAt at, class T>
inline void scale_far(const T* x, const FarRun& c, const double* roots, int64_t count, T* y) {
  specialized([=] {
    ORTHONORM_SAME_OR_APART
    for (int64_t j = 0; j < count; ++j) {
      const double factor = far_factor<at>(c.root * roots[j], c.eps) * c.ratio;
      narrow(times(widen(x[j]), factor), y[j]);
    }
  });
}

// Sum of the squares that `scale_far` with ratio 1 would give, in 16 interleaved sums.
template <EpsAt at, class T>
inline double sum_far(const T* x, const FarRun& c, const double* roots, int64_t count) {
  constexpr int64_t lanes = 16;
  double result;
  specialized([=, &result] {
    double sums[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const double factor = far_factor<at>(c.root * roots[i + lane], c.eps);
        const double y = widen(x[i + lane]) * factor;
        sums[lane] += y * y;
      }
    }
    for (int64_t lane = 0; i < count; ++i, ++lane) {
      const double y = widen(x[i]) * far_factor<at>(c.root * roots[i], c.eps);
      sums[lane] += y * y;
    }
    result = fold<lanes>(sums);
  });
  return result;
}

}  // namespace orthonorm
