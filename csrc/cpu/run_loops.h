// Loops over the runs of one matrix of any dtype and strides, a tile at a time.
#pragma once

#include "moment_jobs.h"
#include "moment_loops.h"

namespace orthonorm {

// Sum of squares of run `o`, or its norm, which is right at every scale.
template <class A>
inline double run_squares(const Runs& x, int64_t o, bool norm) {
  alignas(64) A scratch[kTile];
  SquareSum wide{0, 0};
  double sum = 0;
  for (int64_t i = 0; i < x.inner; i += kTile) {
    const int64_t count = std::min(kTile, x.inner - i);
    const A* values = load(x.at(o, i), x.dtype, x.stride_inner, count, scratch);
    if constexpr (sizeof(A) == 4) {
      sum += sum_squares(values, count);
    } else {
      const SquareSum part = sum_squares(values, count);
      wide = i == 0 ? part : wide + part;
    }
  }
  if constexpr (sizeof(A) == 4) return norm ? std::sqrt(sum) : sum;
  return norm ? wide.norm() : std::ldexp(wide.sum, static_cast<int>(2 * wide.exponent));
}

// Calls f(o, rows) for groups of eight runs of a tile, elements [i, i + count), and for each that is
// left over. What lies `ahead` runs further on, if not beyond `last`, comes into the cache meanwhile.
template <class A, class F>
inline void for_rows(const Runs& x, int64_t o0, int64_t o1, int64_t i, int64_t count, int64_t ahead,
                     int64_t last, const F& f) {
  constexpr int R = 8;
  alignas(64) A scratch[R][kTile];
  const bool direct = x.dtype == dtype_of<A>() && x.stride_inner == 1;
  int64_t o = o0;
  for (; o + R <= o1; o += R) {
    Rows<R, A> rows;
    for (int64_t r = 0; r < R; ++r) {
      rows.at[r] = load(x.at(o + r, i), x.dtype, x.stride_inner, count, scratch[r]);
    }
    if (direct && o + ahead + R <= last) rows.ahead = x.at(ahead, 0) - x.at(0, 0);
    f(o, rows);
  }
  for (; o < o1; ++o) {
    const A* row = load(x.at(o, i), x.dtype, x.stride_inner, count, scratch[0]);
    f(o, Rows<1, A>{{row}});
  }
}

// Column sums of squares over the runs of a unit no wider than a tile. Squares of float64, which
// double rounds, are added in short sums first: one sum of 300 was off by 2.7e-16 (2026-11).
template <class A>
inline void sum_columns(const Runs& x, const Unit& unit, double* sums) {
  constexpr int64_t chunk = sizeof(A) == 8 ? 64 : INT64_MAX / 2;
  const int64_t count = unit.i1 - unit.i0;
  std::fill(sums, sums + count, 0.0);
  for (int64_t o = unit.o0; o < unit.o1; o += chunk) {
    double part[kTile] = {};
    const bool whole = unit.o1 - unit.o0 <= chunk;
    for_rows<A>(x, o, std::min(o + chunk, unit.o1), unit.i0, count, 8, x.outer,
                [&](int64_t, const auto& rows) { add_squares(rows, count, whole ? sums : part); });
    if (!whole) add_to(sums, part, count);
  }
}

// sums of squares of `count` columns -> their norms. The rare ones whose squares left the range of
// double (float64 data only) are measured again, each against its peak.
inline void column_norms(const Job& job, int64_t first, int64_t count, double* sums) {
  const Runs& x = job.x;
  for (int64_t i = 0; i < count; ++i) {
    const bool safe = (sums[i] > 1e-280 && sums[i] <= DBL_MAX) || sums[i] != sums[i];
    if (safe || x.dtype != ScalarType::Double) {
      sums[i] = std::sqrt(sums[i]);
    } else {
      Runs column = x;
      column.swap();
      sums[i] = run_squares<double>(column, first + i, true);
    }
  }
}

// Calls f(o, i, x, count, y, next) for every piece of every run of a unit: y (which may be x) is
// what goes to the output, next the same piece `ahead` runs further on. Where the output is
// transposed the runs go in narrow bands, so that its lines are filled before they leave the cache.
template <class A, class F>
inline void map_runs(const Job& job, const Unit& unit, int64_t ahead, const F& f) {
  alignas(64) A from[kTile], to[kTile];
  const Runs &x = job.x, &out = job.out;
  const bool banded = out.stride_inner != 1 && out.data != x.data;
  const int64_t band = banded ? 64 : std::max<int64_t>(1, unit.i1 - unit.i0);
  for (int64_t b = unit.i0; b < unit.i1; b += band) {
    const int64_t end = std::min(b + band, unit.i1);
    for (int64_t o = unit.o0; o < unit.o1; ++o) {
      for (int64_t i = b; i < end; i += kTile) {
        const int64_t count = std::min(kTile, end - i);
        const A* values = load(x.at(o, i), x.dtype, x.stride_inner, count, from);
        A* result = target(out.at(o, i), out.dtype, out.stride_inner, to);
        Ahead next;
        if (x.stride_inner == 1 && o + ahead < x.outer) {
          next = {x.at(o + ahead, i), element_size(x.dtype)};
        }
        f(o, i, values, count, result, next);
        store(result, out.at(o, i), out.dtype, out.stride_inner, count);
      }
    }
  }
}

}  // namespace orthonorm
