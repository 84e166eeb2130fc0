// Loops over the runs of one matrix of any dtype and strides, a tile at a time.
#pragma once

#include "moment_jobs.h"
#include "moment_loops.h"
#include "square_sums.h"

namespace orthonorm {

// Elements that are converted at a time where they do not lie in one piece.
constexpr int64_t kScratch = 1024;

// How many bytes ahead a single run is fetched where runs lie one behind the other: across the end
// of a page, where hardware prefetching stops, and no further. 170 MB summed run by run on one
// thread of Zen 4 (2026-11): 6 KB ahead 7.9 ms, 8 KB 8.9, 12 KB 9.2, not at all 7.7.
constexpr int64_t kPagesAhead = 6144;

// Calls f(i, count, rows) with elements [i0, i1) of runs [o, o + R): all of them as they lie in
// memory, or a piece at a time converted to float or double. What lies `ahead` runs further on
// comes into the cache meanwhile, unless it is 0.
template <int R, class F>
inline void with_rows(const Runs& x, int64_t o, int64_t i0, int64_t i1, int64_t ahead, const F& f) {
  const auto converted = [&]<class A>(A) {
    constexpr int64_t piece = R > 8 ? kScratch / 4 : kScratch;
    alignas(64) A scratch[R][piece];
    for (int64_t i = i0; i < i1; i += piece) {
      const int64_t count = std::min(piece, i1 - i);
      Rows<R, A> rows;
      for (int64_t r = 0; r < R; ++r) {
        load_into(x.at(o + r, i), x.dtype, x.stride_inner, count, scratch[r]);
        rows.at[r] = scratch[r];
      }
      f(i, count, rows);
    }
  };
  if (x.stride_inner != 1) {
    return x.dtype == ScalarType::Double ? converted(double()) : converted(float());
  }
  with_element("orthonorm", x.dtype, [&]<class T>(T) {
    Rows<R, T> rows;
    for (int64_t r = 0; r < R; ++r) rows.at[r] = reinterpret_cast<const T*>(x.at(o + r, i0));
    if (ahead != 0 && o + ahead + R <= x.outer) rows.ahead = x.at(ahead, 0) - x.at(0, 0);
    if (R == 1 && x.stride_outer == x.inner) rows.ahead = std::min(rows.ahead, kPagesAhead);
    f(i0, i1 - i0, rows);
  });
}

// Sum of squares of run `o`, or its norm, which is right at every scale.
inline double run_squares(const Runs& x, int64_t o, bool norm) {
  SquareSum wide{0, 0};
  double sum = 0;
  const auto add = [&]<class T>(int64_t i, int64_t count, const Rows<1, T>& row) {
    if constexpr (sizeof(T) < 8) {
      sum += sum_squares(row, count);
    } else {
      const SquareSum part = sum_squares(row, count);
      wide = i == 0 ? part : wide + part;
    }
  };
  const int64_t ahead = runs_ahead(x, kAheadOfSums);
  for (int64_t i = 0; i < x.inner; i += kTile) {
    with_rows<1>(x, o, i, std::min(i + kTile, x.inner), ahead, add);
  }
  if (x.dtype != ScalarType::Double) return norm ? std::sqrt(sum) : sum;
  return norm ? wide.norm() : std::ldexp(wide.sum, static_cast<int>(2 * wide.exponent));
}

// Column sums of squares over the runs of a unit no wider than a tile. Squares of float64, which
// double rounds, are added in short sums first: one sum of 300 was off by 2.7e-16 (2026-11).
// The sums stay in registers over kSummed runs: read, added to and written for every run they were
// half of all accesses to the first cache, which they fill, 8 bytes a column.
constexpr int64_t kSummed = 8;

inline void sum_columns(const Runs& x, const Unit& unit, double* sums) {
  const int64_t chunk = x.dtype == ScalarType::Double ? 64 : INT64_MAX / 2;
  const int64_t count = unit.i1 - unit.i0;
  const int64_t ahead = std::max(kSummed, runs_ahead(x, kAheadOfSums));
  std::fill(sums, sums + count, 0.0);
  for (int64_t begin = unit.o0; begin < unit.o1; begin += chunk) {
    const int64_t end = std::min(begin + chunk, unit.o1);
    double part[kTile];
    const bool whole = unit.o1 - unit.o0 <= chunk;
    double* to = whole ? sums : part;
    if (!whole) std::fill(part, part + count, 0.0);
    const auto add = [&](int64_t i, int64_t n, const auto& rows) {
      add_squares(rows, n, to + (i - unit.i0));
    };
    int64_t o = begin;
    for (; o + kSummed <= end; o += kSummed) {
      with_rows<kSummed>(x, o, unit.i0, unit.i1, ahead, add);
    }
    for (; o < end; ++o) with_rows<1>(x, o, unit.i0, unit.i1, ahead, add);
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
      sums[i] = run_squares(column, first + i, true);
    }
  }
}

// The factors of a tile of columns as Splits.
class SplitTile {
 public:
  SplitTile(const double* factors, int64_t count, double ratio = 1) {
    float *high = high_, *low = low_;
    specialized([=] {
      for (int64_t i = 0; i < count; ++i) {
        const Split factor(factors[i] * ratio);
        high[i] = factor.high, low[i] = factor.low;
      }
    });
  }
  Splits from(int64_t i) const { return {high_ + i, low_ + i}; }

 private:
  alignas(64) float high_[kTile], low_[kTile];
};

// Columns that are scaled at a time: two floats for each of them stay in a first cache of 32 KB,
// and what comes from behind it is X alone.
constexpr int64_t kBand = 1024;

// Calls f(band, ahead) for bands of a unit's columns, and how many runs ahead to fetch.
template <class F>
inline void for_bands(const Unit& unit, const F& f) {
  for (int64_t i = unit.i0; i < unit.i1; i += kBand) {
    const int64_t end = std::min(i + kBand, unit.i1);
    f(Unit{unit.job, unit.o0, unit.o1, i, end, unit.work}, ceil_div(4 * kBand, end - i));
  }
}

// Calls f(o, i, x, count, y, next) for every piece of every run of a unit: y (which may be x) is
// what goes to the output, next the same piece some runs further on. Where the output is transposed
// the runs go in narrow bands, so that its lines are filled before they leave the cache.
template <class F>
inline void map_runs(const Job& job, const Unit& unit, int64_t ahead, const F& f) {
  const Runs &x = job.x, &out = job.out;
  const auto next = [&](int64_t o, int64_t i) -> Ahead {
    if (x.stride_inner != 1 || o + ahead >= x.outer) return {};
    return {x.at(o + ahead, i), element_size(x.dtype)};
  };
  if (x.stride_inner == 1 && out.stride_inner == 1) {
    return with_element("orthonorm", x.dtype, [&]<class T>(T) {
      for (int64_t o = unit.o0; o < unit.o1; ++o) {
        f(o, unit.i0, reinterpret_cast<const T*>(x.at(o, unit.i0)), unit.i1 - unit.i0,
          reinterpret_cast<T*>(out.at(o, unit.i0)), next(o, unit.i0));
      }
    });
  }
  const auto converted = [&]<class A>(A) {
    alignas(64) A from[kScratch], to[kScratch];
    const bool banded = out.stride_inner != 1 && out.data != x.data;
    const int64_t band = banded ? 64 : std::max<int64_t>(1, unit.i1 - unit.i0);
    for (int64_t b = unit.i0; b < unit.i1; b += band) {
      const int64_t end = std::min(b + band, unit.i1);
      for (int64_t o = unit.o0; o < unit.o1; ++o) {
        for (int64_t i = b; i < end; i += kScratch) {
          const int64_t count = std::min(kScratch, end - i);
          const A* values = load(x.at(o, i), x.dtype, x.stride_inner, count, from);
          A* result = target(out.at(o, i), out.dtype, out.stride_inner, to);
          f(o, i, values, count, result, next(o, i));
          store(result, out.at(o, i), out.dtype, out.stride_inner, count);
        }
      }
    }
  };
  x.dtype == ScalarType::Double ? converted(double()) : converted(float());
}

}  // namespace orthonorm
