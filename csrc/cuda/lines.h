// Sums along rows and columns, moments and norms of them, and matrices scaled by what they give:
// device part. `line_lists.h` cuts lists into tables and launches.
//
// A matrix is seen with columns that are short-strided in memory, whatever rows and columns were.
// A block takes a tile of 128 x 256, a warp every eighth row, a lane two runs of four columns.
// Tiles leave a partial sum for every row and column they touch; those are added in order, so
// results depend on the matrix and its dtype alone. Three launches: squares, factors, application;
// a factored moment that keeps the norm reads the matrix once more between the last two.
#pragma once

#include "line_rule.h"
#include "sums.h"

namespace orthonorm::cuda {

inline constexpr int line_threads = 256, group_lines = 256;
inline constexpr int tile_rows = 128, tile_columns = 256;

enum Side { rows_side = 0, columns_side = 1 };

// A batch of matrices. [2]: of rows and of columns; offsets are into the scratch of a launch.
struct LineEntry {
  char *x, *out, *moments[2];
  int64_t lines[2];  // how many rows, how many columns
  int64_t x_stride[3], out_stride[3], moment_stride[2][2];  // batch, row, column; batch, line
  int64_t factors[2], partials[2];
  uint32_t first_tile, tiles, across;  // tiles before, of a matrix, in a row of them
  uint32_t first_group, groups;        // groups of lines before, of a matrix
  Element type, out_type, moment_type[2];
  bool sums[2];  // whether rows, whether columns are wanted
  Side mean;     // the side whose mean a factored moment divides by

  __device__ uint32_t groups_of(int side) const {
    return sums[side] ? static_cast<uint32_t>((lines[side] + group_lines - 1) / group_lines) : 0;
  }
};

struct LineTable {
  static constexpr int most_entries = (16384 - 16) / static_cast<int>(sizeof(LineEntry));
  int32_t entries_used = 0;
  uint32_t tiles = 0, groups = 0;
  LineEntry entries[most_entries];
};

// Squares of floats add up exactly enough in double; those of doubles carry an exponent.
template <class A>
using Sum = std::conditional_t<sizeof(A) == 8, SquareSum, double>;

__device__ inline double squared(float x) { return static_cast<double>(x) * x; }
__device__ inline SquareSum squared(double x) { return square(x); }
__device__ inline double norm_of(double sum) { return std::sqrt(sum); }
__device__ inline double norm_of(const SquareSum& sum) { return sum.norm(); }

// What a group of lines adds up for its matrix.
struct GroupSums {
  double before = 0, after = 0, moments = 0;
};

// A block's tile, and this thread's place in it.
struct Tile {
  int64_t matrix, row, column;  // of the tile's corner
  uint32_t down, over;
  int first, second;  // where a lane's runs of four columns begin
  bool there[2];      // whether a lane's runs are columns of the matrix
  bool wide;          // whether a lane's numbers may be moved 16 bytes at a time

  __device__ Tile(const LineEntry& e, uint32_t inside, const char* data, const int64_t* stride,
                  int size) {
    matrix = inside / e.tiles;
    down = inside % e.tiles / e.across;
    over = inside % e.tiles % e.across;
    row = int64_t{down} * tile_rows;
    column = int64_t{over} * tile_columns;
    const int lane = threadIdx.x % warp, own = size_of(e.type) == 2 ? 8 : 4;
    first = own * lane;
    second = first + (own == 8 ? 4 : tile_columns / 2);
    const int64_t left = e.lines[columns_side] - column;
    there[0] = first < left, there[1] = second < left;
    const bool cut = own == 8 ? there[0] && first + 8 > left
                              : (there[0] && first + 4 > left) || (there[1] && second + 4 > left);
    wide = !cut && even(data, stride, size);
  }

  __device__ static bool even(const char* data, const int64_t* stride, int size) {
    return stride[2] == 1 && stride[1] * size % 16 == 0 && stride[0] * size % 16 == 0 &&
           reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  __device__ int64_t place(int i) const { return column + (i < 4 ? first + i : second + i - 4); }
};

// Calls f(row, x) with this lane's eight numbers of each of its rows; 0 beyond the last column. A
// warp has `together` rows in flight.
template <class A, int together, class F>
__device__ inline void each_row(const LineEntry& e, const Tile& tile, const F& f) {
  const int size = size_of(e.type), own = threadIdx.x / warp, warps = line_threads / warp;
  const char* x = e.x + tile.matrix * e.x_stride[0] * size;
  for (int step = 0; step < tile_rows; step += warps * together) {
    const int64_t row = tile.row + step + own;
    Eight<A> raw[together];
#pragma unroll
    for (int r = 0; r < together; ++r) {
      const int64_t at = row + r * warps;
      if (!tile.wide || at >= e.lines[rows_side]) continue;
      const char* line = x + (at * e.x_stride[1] + tile.column) * size;
      raw[r].load(line, e.type, tile.first, tile.second, tile.there);
    }
#pragma unroll
    for (int r = 0; r < together; ++r) {
      const int64_t at = row + r * warps;
      if (at >= e.lines[rows_side]) break;  // the same for a whole warp
      A values[8];
      if (tile.wide) {
        raw[r].get(e.type, values);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int64_t j = tile.place(i);
          const int64_t offset = at * e.x_stride[1] + j * e.x_stride[2];
          values[i] = j < e.lines[columns_side] ? load<A>(x + offset * size, e.type) : A(0);
        }
      }
      f(at, values);
    }
  }
}

// Partial sums of squares: of rows by columns of tiles, of columns by rows of tiles.
template <class A>
__global__ void __launch_bounds__(line_threads)
    line_squares_kernel(ORTHONORM_CONSTANT(LineTable) table, Sum<A>* partials) {
  const LineEntry& e = locate<&LineEntry::first_tile>(table, blockIdx.x);
  const Tile tile(e, blockIdx.x - e.first_tile, e.x, e.x_stride, size_of(e.type));
  Sum<A> columns[8] = {};
  const int64_t rows = e.lines[rows_side], width = e.lines[columns_side];
  Sum<A>* const of_rows = partials + e.partials[rows_side] +
                          (tile.matrix * e.across + tile.over) * rows;
  each_row<A, 4>(e, tile, [&](int64_t row, const A(&x)[8]) {
    Sum<A> total = squared(x[0]);
    columns[0] = columns[0] + total;
#pragma unroll
    for (int i = 1; i < 8; ++i) {
      const auto square = squared(x[i]);
      total = total + square;
      columns[i] = columns[i] + square;
    }
    if (!e.sums[rows_side]) return;
    total = warp_sum(total);
    if (threadIdx.x % warp == 0) of_rows[row] = total;
  });
  if (!e.sums[columns_side]) return;
  constexpr int warps = line_threads / warp;
  ORTHONORM_SHARED(Sum<A>, sums, warps * tile_columns);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sums[threadIdx.x / warp * tile_columns + tile.place(i) - tile.column] = columns[i];
  }
  __syncthreads();
  const int64_t j = tile.column + threadIdx.x;
  if (j >= width) return;
  Sum<A> total = sums[threadIdx.x];
  for (int w = 1; w < warps; ++w) total = total + sums[w * tile_columns + threadIdx.x];
  const int64_t down = e.tiles / e.across;
  partials[e.partials[columns_side] + (tile.matrix * down + tile.down) * width + j] = total;
}

// The factor of a line from its sum of squares, its moment updated.
template <class A>
__device__ inline double line_factor(const LineEntry& e, const LineRule& rule, int side,
                                     int64_t matrix, int64_t line, const Sum<A>& total,
                                     GroupSums& sums) {
  const double norm = norm_of(total);
  if (!rule.moments) return inverse_or_zero(divisor(norm * rule.scale, rule.eps, rule.at));
  const int64_t offset = matrix * e.moment_stride[side][0] + line * e.moment_stride[side][1];
  char* const at = e.moments[side] + offset * size_of(e.moment_type[side]);
  const double mean = norm * norm / static_cast<double>(e.lines[1 - side]);
  const double old = load<double>(at, e.moment_type[side]);
  const double moment = decayed(old, mean, rule.beta2);
  store(at, e.moment_type[side], moment);
  const double factor = rule.factored
                            ? std::sqrt(moment)
                            : inverse_or_zero(denominator(moment, rule.eps, rule.at));
  sums.before += norm * norm;
  sums.after += norm * factor * (norm * factor);
  sums.moments += moment;
  return factor;
}

// A factor for every line, a block for a group of them.
template <class A>
__global__ void __launch_bounds__(group_lines)
    line_factors_kernel(ORTHONORM_CONSTANT(LineTable) table, ORTHONORM_CONSTANT(LineRule) rule,
                        const Sum<A>* partials, double* factors, GroupSums* groups) {
  const LineEntry& e = locate<&LineEntry::first_group>(table, blockIdx.x);
  const uint32_t inside = blockIdx.x - e.first_group;
  const int64_t matrix = inside / e.groups;
  const uint32_t group = inside % e.groups, rows = e.groups_of(rows_side);
  const int side = group < rows ? rows_side : columns_side;
  const int64_t line = int64_t{group - (side ? rows : 0)} * group_lines + threadIdx.x;
  const int64_t lines = e.lines[side], parts = side ? e.tiles / e.across : e.across;
  GroupSums sums;
  if (line < lines) {
    const Sum<A>* own = partials + e.partials[side] + matrix * parts * lines + line;
    Sum<A> total = own[0];
    for (int64_t p = 1; p < parts; ++p) total = total + own[p * lines];
    factors[e.factors[side] + matrix * lines + line] =
        line_factor<A>(e, rule, side, matrix, line, total, sums);
  }
  if (!rule.moments) return;
  sums.before = block_sum<group_lines>(sums.before);
  __syncthreads();
  sums.after = block_sum<group_lines>(sums.after);
  __syncthreads();
  sums.moments = block_sum<group_lines>(sums.moments);
  if (threadIdx.x == 0) groups[blockIdx.x] = sums;
}

// The sum of one member of the group sums of a matrix's side, for every thread.
template <double GroupSums::*member>
__device__ inline double side_sum(const LineEntry& e, int64_t matrix, int side,
                                  const GroupSums* groups) {
  const uint32_t first = e.first_group + static_cast<uint32_t>(matrix) * e.groups +
                         (side ? e.groups_of(rows_side) : 0);
  double total = 0;
  for (uint32_t g = threadIdx.x % warp; g < e.groups_of(side); g += warp) {
    total += groups[first + g].*member;
  }
  return warp_sum(total);
}

// What the numbers of a tile are multiplied by.
struct Factors {
  const double *rows, *columns;  // null: not wanted
  double eps, scale;             // of the product of roots; of everything
  EpsAt at;
  bool factored;

  __device__ Factors(const LineEntry& e, const LineRule& rule, int64_t matrix,
                     const double* factors, const GroupSums* groups)
      : eps(rule.eps), scale(1), at(rule.at), factored(rule.factored) {
    rows = of_side(e, rows_side, matrix, factors);
    columns = of_side(e, columns_side, matrix, factors);
    if (factored) {
      const double mean = side_sum<&GroupSums::moments>(e, matrix, e.mean, groups) /
                          static_cast<double>(e.lines[e.mean]);
      scale = inverse_or_zero(std::sqrt(mean));
    }
  }

  __device__ static const double* of_side(const LineEntry& e, int side, int64_t matrix,
                                          const double* factors) {
    return e.sums[side] ? factors + e.factors[side] + matrix * e.lines[side] : nullptr;
  }

  __device__ double operator()(double row, double column) const {
    if (!factored) return row * column * scale;
    return inverse_or_zero(divisor(row * column * scale, eps, at));
  }
};

// Squares of a tile after a factored moment, before the norm is kept.
template <class A>
__global__ void __launch_bounds__(line_threads, sizeof(A) == 4 ? 2 : 1)
    line_norms_kernel(ORTHONORM_CONSTANT(LineTable) table, ORTHONORM_CONSTANT(LineRule) rule,
                      const double* factors, const GroupSums* groups, double* after) {
  const LineEntry& e = locate<&LineEntry::first_tile>(table, blockIdx.x);
  const Tile tile(e, blockIdx.x - e.first_tile, e.x, e.x_stride, size_of(e.type));
  const Factors factor(e, rule, tile.matrix, factors, groups);
  double columns[8], total = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t j = tile.place(i);
    columns[i] = j < e.lines[columns_side] ? factor.columns[j] : 0;
  }
  each_row<A, 4>(e, tile, [&](int64_t row, const A(&x)[8]) {
    const double own = factor.rows[row];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const double y = static_cast<double>(x[i]) * factor(own, columns[i]);
      total += y * y;
    }
  });
  total = block_sum<line_threads>(total);
  if (threadIdx.x == 0) after[blockIdx.x] = total;
}

// out <- x times its factor, rounded once.
template <class A>
__global__ void __launch_bounds__(line_threads, sizeof(A) == 4 ? 2 : 1)
    line_apply_kernel(ORTHONORM_CONSTANT(LineTable) table, ORTHONORM_CONSTANT(LineRule) rule,
                      const double* factors, const GroupSums* groups, const double* after) {
  const LineEntry& e = locate<&LineEntry::first_tile>(table, blockIdx.x);
  const Tile tile(e, blockIdx.x - e.first_tile, e.x, e.x_stride, size_of(e.type));
  const Factors factor(e, rule, tile.matrix, factors, groups);
  double keep = 1;
  if (rule.moments && rule.keep_norm) {
    const int side = e.sums[rows_side] ? rows_side : columns_side;
    const double before = side_sum<&GroupSums::before>(e, tile.matrix, side, groups);
    double now = 0;
    if (rule.factored) {
      const double* own = after + e.first_tile + tile.matrix * e.tiles;
      for (uint32_t t = threadIdx.x % warp; t < e.tiles; t += warp) now += own[t];
      now = warp_sum(now);
    } else {
      now = side_sum<&GroupSums::after>(e, tile.matrix, side, groups);
    }
    keep = norm_ratio(before, now);
  }
  const int size = size_of(e.out_type);
  const bool wide = tile.wide && size == size_of(e.type) && Tile::even(e.out, e.out_stride, size);
  char* const out = e.out + tile.matrix * e.out_stride[0] * size;
  double columns[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t j = tile.place(i);
    columns[i] = factor.columns && j < e.lines[columns_side] ? factor.columns[j] : 1;
  }
  each_row<A, 2>(e, tile, [&](int64_t row, const A(&x)[8]) {
    const double own = factor.rows ? factor.rows[row] : 1;
    A y[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const double exact = static_cast<double>(x[i]) * (factor(own, columns[i]) * keep);
      if constexpr (sizeof(A) == 8) {
        y[i] = exact;
      } else {
        y[i] = size == 2 ? to_odd(exact) : static_cast<float>(exact);
      }
    }
    if (wide) {
      Eight<A> raw;
      raw.put(e.out_type, y);
      raw.store(out + (row * e.out_stride[1] + tile.column) * size, e.out_type, tile.first,
                tile.second, tile.there);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t j = tile.place(i);
      if (j >= e.lines[columns_side]) continue;
      store(out + (row * e.out_stride[1] + j * e.out_stride[2]) * size, e.out_type, y[i]);
    }
  });
}

}  // namespace orthonorm::cuda
