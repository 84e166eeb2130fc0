// Measuring, scaling and transposing one small matrix; torch-free.
//
// Rows end in a vector that overlaps the one before it instead of in single elements: 31 x 31 takes
// what 32 x 32 takes. Rows shorter than a vector go one by one.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "small_newton_schulz_tile.h"

namespace orthonorm::small {

// x / divisor as ((x first) second) / by: powers of two that bring x near 1, then a plain number.
struct Divisor {
  double first = 1, second = 1, by = 1;
};

// What precedes the polynomial: X / (safety max(|X|_F, eps)), or X / safety.
struct Scaling {
  bool scale;
  double eps, safety;
};

// K values of type In as doubles, K doubles filling a vector of machine M.
template <class M, class In>
struct Doubles {
  static constexpr int K = M::W * static_cast<int>(sizeof(typename M::E)) / 8;
  using D = typename Lanes<double, K>::V;
  typedef typename Lanes<In, K>::V Values __attribute__((aligned(alignof(In))));

  ORTHONORM_INLINE static void load(const In* p, D& d) {
    d = __builtin_convertvector(*reinterpret_cast<const Values*>(p), D);
  }
  ORTHONORM_INLINE static void store(In* p, const D& d) {
    *reinterpret_cast<Values*>(p) = __builtin_convertvector(d, typename Lanes<In, K>::V);
  }
};

// Sum over the matrix of (x first second)^2. Which partial sum a value joins depends on its column.
template <class M, class In>
ORTHONORM_INLINE double sum_squares(const In* x, int64_t ld, int64_t L, int64_t S,
                                    const Divisor& d) {
  using Load = Doubles<M, In>;
  using D = typename Load::D;
  constexpr int K = Load::K;
  D sums[4] = {}, counted;  // counted: 1 in the lanes of a row's last vector that overlap
  double rest = 0;
  ORTHONORM_UNROLL
  for (int l = 0; l < K; ++l) counted[l] = l < K - S % K ? 1 : 0;
  const auto square = [&](D& v, D& sum) __attribute__((always_inline)) {
    if constexpr (sizeof(In) == 8) v = v * d.first * d.second;
    sum += v * v;
  };
  for (int64_t r = 0; r < L; ++r) {
    const In* const row = x + r * ld;
    int64_t c = 0;
    D v;
    for (; c + 4 * K <= S; c += 4 * K) {  // four sums hide the latency of an addition
      ORTHONORM_UNROLL
      for (int q = 0; q < 4; ++q) {
        Load::load(row + c + q * K, v);
        square(v, sums[q]);
      }
    }
    for (; c + K <= S; c += K) {
      Load::load(row + c, v);
      square(v, sums[0]);
    }
    if (c < S && S >= K) {
      Load::load(row + S - K, v);
      v = counted != 0 ? D{} : v;
      square(v, sums[1]);
    } else {
      for (; c < S; ++c) {
        const double one = double(row[c]) * d.first * d.second;
        rest += one * one;
      }
    }
  }
  sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int l = 0; l < K; ++l) rest += sums[0][l];
  return rest;
}

// The powers of two that bring the largest entry into [1/2, 1): two where one would overflow.
inline Divisor unit_of(double largest) {
  if (!(largest > 0) || std::isinf(largest)) return {};
  int exponent = 0;
  std::frexp(largest, &exponent);
  if (exponent < -1000) return {0x1p1000, std::ldexp(1.0, -1000 - exponent), 1};
  return {std::ldexp(1.0, -exponent), 1, 1};
}

// Squares of float fit double; doubles are measured in units of their largest entry.
template <class In>
ORTHONORM_INLINE Divisor unit_for(const In* x, int64_t ld, int64_t L, int64_t S) {
  if (sizeof(In) == 4) return {};
  double largest = 0;
  for (int64_t r = 0; r < L; ++r) {
    for (int64_t c = 0; c < S; ++c) {
      const double v = std::fabs(double(x[r * ld + c]));
      largest = v > largest ? v : largest;
    }
  }
  return unit_of(largest);
}

// The divisor of a matrix whose norm is `own` in these units, or `norm` if given; by = 0 means: all
// zero.
inline Divisor divisor_of(const Divisor& unit, double own, const Scaling& scaling,
                          const double* norm) {
  if (!scaling.scale) return {1, 1, scaling.safety};
  // A comparison with NaN is false: a NaN norm stays.
  if (norm != nullptr) {
    return {1, 1, scaling.safety * (*norm < scaling.eps ? scaling.eps : *norm)};
  }
  if (own < scaling.eps * unit.first * unit.second) return {1, 1, scaling.safety * scaling.eps};
  return {unit.first, unit.second, scaling.safety * own};
}

// The divisor of a matrix, which is measured only if need be.
template <class M, class In>
ORTHONORM_INLINE Divisor measure(const In* x, int64_t ld, int64_t L, int64_t S,
                                 const Scaling& scaling, const double* norm) {
  if (!scaling.scale || norm != nullptr) return divisor_of({}, 0, scaling, norm);
  const Divisor unit = unit_for(x, ld, L, S);
  // Rows without gaps whose values take the four sums in turn are one row.
  const bool one = ld == S && S % (4 * Doubles<M, In>::K) == 0;
  const double n = std::sqrt(one ? sum_squares<M>(x, 0, 1, L * S, unit)
                                 : sum_squares<M>(x, ld, L, S, unit));
  return divisor_of(unit, n, scaling, nullptr);
}

// X = f(x) for a function of vectors of doubles and of a double; zeros in columns [S, columns) and
// rows [L, rows).
template <class M, class In, class E, class F>
ORTHONORM_INLINE void map_rows(const In* x, int64_t ldx, int64_t L, int64_t S, E* X, int64_t ld,
                               int64_t rows, int64_t columns, const F& f) {
  using Load = Doubles<M, In>;
  using Store = Doubles<M, E>;
  constexpr int K = Load::K;
  typename Load::D v;
  for (int64_t r = 0; r < L; ++r) {
    const In* const from = x + r * ldx;
    E* const to = X + r * ld;
    for (int64_t c = S / K * K; c < columns; c += K) Store::store(to + c, typename Load::D{});
    int64_t c = 0;
    for (; c + K <= S; c += K) {
      Load::load(from + c, v);
      f(v);
      Store::store(to + c, v);
    }
    if (c < S && S >= K) {
      Load::load(from + S - K, v);
      f(v);
      Store::store(to + S - K, v);
    } else {
      for (; c < S; ++c) {
        double one = from[c];
        f(one);
        to[c] = static_cast<E>(one);
      }
    }
  }
  for (int64_t r = L; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += K) Store::store(X + r * ld + c, typename Load::D{});
  }
}

// X = x / divisor rounded once, padded by zeros as map_rows has it.
template <class M, class In, class E>
ORTHONORM_INLINE void scale(const In* x, int64_t ldx, int64_t L, int64_t S, const Divisor& d, E* X,
                            int64_t ld, int64_t rows, int64_t columns) {
  const bool plain = d.by > 0x1p-1000 && d.by < 0x1p1000;
  if (d.by == 0) {
    map_rows<M>(x, ldx, L, S, X, ld, rows, columns,
                [](auto& v) __attribute__((always_inline)) { v = std::decay_t<decltype(v)>{}; });
  } else if (sizeof(In) == 4 && sizeof(E) == 4 && plain) {
    // Dividing would cost a tenth of a 32 x 32 polynomial (2026-11), and float cannot tell.
    const double factor = 1 / d.by;
    map_rows<M>(x, ldx, L, S, X, ld, rows, columns,
                [=](auto& v) __attribute__((always_inline)) { v = v * factor; });
  } else {
    map_rows<M>(x, ldx, L, S, X, ld, rows, columns, [=](auto& v) __attribute__((always_inline)) {
      v = v * d.first * d.second / d.by;
    });
  }
}

// to[c][r] = from[r][c]. Blocks at the far edges overlap their neighbours instead of being cut.
template <class M>
ORTHONORM_INLINE void transpose_copy(const typename M::E* from, int64_t ld_from, int64_t rows,
                                     int64_t cols, typename M::E* to, int64_t ld_to) {
  constexpr int W = M::W;
  typedef typename M::V U __attribute__((aligned(alignof(typename M::E))));  // not aligned
  if (rows < W || cols < W) {
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t r = 0; r < rows; ++r) to[c * ld_to + r] = from[r * ld_from + c];
    }
    return;
  }
  for (int64_t i = 0; i < rows; i += W) {
    const int64_t r0 = i + W <= rows ? i : rows - W;
    for (int64_t j = 0; j < cols; j += W) {
      const int64_t c0 = j + W <= cols ? j : cols - W;
      typename M::V block[W];
      ORTHONORM_UNROLL
      for (int r = 0; r < W; ++r) {
        block[r] = *reinterpret_cast<const U*>(from + (r0 + r) * ld_from + c0);
      }
      transpose<typename M::V, W>(block);
      ORTHONORM_UNROLL
      for (int c = 0; c < W; ++c) {
        *reinterpret_cast<U*>(to + (c0 + c) * ld_to + r0) = block[c];
      }
    }
  }
}

// to = from, contiguous.
template <class M>
ORTHONORM_INLINE void copy_rows(const typename M::E* from, int64_t ld_from, int64_t rows,
                                int64_t cols, typename M::E* to) {
  constexpr int W = M::W;
  typedef typename M::V U __attribute__((aligned(alignof(typename M::E))));
  for (int64_t r = 0; r < rows; ++r, from += ld_from, to += cols) {
    int64_t c = 0;
    for (; c + W <= cols; c += W) *reinterpret_cast<U*>(to + c) = at<typename M::V>(from + c);
    if (c < cols && cols >= W) {
      *reinterpret_cast<U*>(to + cols - W) = *reinterpret_cast<const U*>(from + cols - W);
    } else {
      for (; c < cols; ++c) to[c] = from[c];
    }
  }
}

}  // namespace orthonorm::small
