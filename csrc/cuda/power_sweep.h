// One pass over 32 rows of a matrix by a block: y = W right of them, and their share of W^T y.
//
// A row must be complete before its share of W^T y can be added, so a block takes a few rows at a
// time and touches each twice: from memory for y, then from shared memory, as far as it holds them,
// and from cache beyond. Where rows are strided and columns are not, lanes take rows and warps
// columns. Which numbers a thread adds up, and in which order, depends on the matrix's shape and
// strides alone.
//
// Powers of two: float sums keep their bits while W right stays comfortable (power_iteration.h).
// Rows that do not are swept again by the block that has them, as 2^-shift W with their largest
// entry in [1, 2); no other block needs to know, as what reads the sums reads the exponents too. y
// enters W^T y divided by the power of two of the largest y so far.
#pragma once

#include "../power_iteration.h"

#include "sums.h"

namespace orthonorm::cuda {

inline constexpr int power_threads = 256, power_warps = power_threads / warp;
inline constexpr int power_rows = 32;      // of a tile
inline constexpr int lowest_power = -4000;  // exponent of rows of zeros

// What a tile leaves beside its y and its sums: y is in units of 2^shift, sums of 2^(2 shift + y).
struct Powers {
  int shift, y;
};

// W as 2^-shift W.
template <class A>
struct Operand {
  const char* data;
  int64_t rows, columns, row, column;  // strides
  Element type;
  power::Shift<A> shift{0};
  bool shifted = false;

  // Whether rows are what is read 16 bytes at a time.
  __device__ bool wide() const {
    const int size = size_of(type);
    return column == 1 && row * size % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  __device__ bool by_rows() const { return columns == 1 || column <= row || rows == 1; }
  __device__ const char* address(int64_t i, int64_t j) const {
    return data + (i * row + j * column) * size_of(type);
  }
  __device__ A scaled(A x) const { return shifted ? shift(x) : x; }
  __device__ A at(int64_t i, int64_t j) const { return scaled(load<A>(address(i, j), type)); }

  // Eight elements of row i, every `apart`-th from column j on, 0 beyond the last.
  __device__ void spread(int64_t i, int64_t j, int apart, A (&x)[8]) const {
    const char* const first = address(i, j);
    const int64_t step = apart * column * size_of(type);
    load_each(
        type, x, [&](int k) { return j + k * apart < columns; },
        [&](int k) { return first + k * step; });
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = scaled(x[k]);
  }
};

// Rows kept on chip: runs of eight elements, as they lie in memory, `runs` of each row.
struct Stage {
  uint4* memory;
  int64_t runs;

  __device__ uint4* at(int row, int64_t run, Element type) const {
    return memory + (row * runs + run) * (size_of(type) / 2);
  }
};

// Eight elements of a row from column j on, that went through the stage if it has room for them.
template <class A>
__device__ inline void again(const Operand<A>& w, int64_t i, int64_t j, int row,
                             const Stage& stage, A (&x)[8]) {
  Eight<A> raw;
  const char* const kept = reinterpret_cast<const char*>(stage.at(row, j / 8, w.type));
  raw.load(j / 8 < stage.runs ? kept : w.address(i, j), w.type, 0, 4);
  raw.get(w.type, x);
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = w.scaled(x[k]);
}

// Eight numbers of scratch, where every eighth begins at 16 bytes.
template <class A>
__device__ inline void read_eight(const A* from, A (&x)[8]) {
  constexpr int words = sizeof(A) / 2;
  uint4 raw[words];
#pragma unroll
  for (int i = 0; i < words; ++i) raw[i] = reinterpret_cast<const uint4*>(from)[i];
  memcpy(x, raw, sizeof x);
}

template <class A>
__device__ inline void write_eight(A* to, const A (&x)[8]) {
  constexpr int words = sizeof(A) / 2;
  uint4 raw[words];
  memcpy(raw, x, sizeof x);
#pragma unroll
  for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(to)[i] = raw[i];
}

template <class T>
__device__ inline T warp_max(T x) {
#pragma unroll
  for (int mask = warp / 2; mask > 0; mask /= 2) {
    const T other = from_lane(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// The largest of a block's numbers, for every thread.
__device__ inline double block_max(double x) {
  ORTHONORM_SHARED(double, largest, power_warps);
  x = warp_max(x);
  __syncthreads();  // the last call's readers
  if (threadIdx.x % warp == 0) largest[threadIdx.x / warp] = x;
  __syncthreads();
  for (int i = 0; i < power_warps; ++i) x = largest[i] > x ? largest[i] : x;
  return x;
}

template <class A>
__device__ inline bool finite(A x) {
  return x - x == 0;
}

// The largest magnitude of rows [first, end); infinity if anything is not finite.
template <class A>
__device__ inline double peak_of(const Operand<A>& w, int64_t first, int64_t end) {
  double largest = 0;
  const int64_t rows = end - first, count = rows * w.columns;
#pragma unroll 1
  for (int64_t e = threadIdx.x; e < count; e += power_threads) {
    const A x = w.by_rows() ? w.at(first + e / w.columns, e % w.columns)
                            : w.at(first + e % rows, e / rows);
    const double size = finite(x) ? std::fabs(static_cast<double>(x)) : HUGE_VAL;
    largest = size > largest ? size : largest;
  }
  return block_max(largest);
}

// A tile on its way; the same in every thread.
template <class A>
struct Sweeping {
  const Operand<A> w;
  const A* right;  // zero up to a multiple of eight
  A *y, *sums;     // of the matrix; of the tile
  Stage stage;
  int64_t first, end;  // rows
  int power = lowest_power;  // of the largest y so far
  double squares = 0;
  bool sound = true;  // this thread's sums are finite

  // Whether the tile's numbers can be trusted.
  __device__ bool run() {
    w.by_rows() ? rows() : columns();
    const double trouble = block_max(sound ? 0 : 1);
    return trouble == 0 && power::comfortable<A>(squares, 1);
  }

 private:
  // y of the rows at hand, to be divided by 2^power; returns what older sums are multiplied by.
  __device__ A take(const A* found, int count, int64_t row) {
    A largest = 0;
    for (int r = 0; r < count; ++r) {
      const A size = std::fabs(found[r]);
      largest = size > largest ? size : largest;
      squares += static_cast<double>(found[r]) * found[r];
    }
    if (static_cast<int>(threadIdx.x) < count) y[row + threadIdx.x] = found[threadIdx.x];
    if (largest == 0 || !finite(largest)) return 1;
    const int now = std::ilogb(largest), before = power;
    if (now <= before) return 1;
    power = now;
    return before == lowest_power ? A(1) : static_cast<A>(std::ldexp(1.0, before - now));
  }

  // total += x times eight numbers of `right` from column j on.
  __device__ void add(const A (&x)[8], int64_t j, A& total) const {
    A factors[8], part = 0;
    read_eight(right + j, factors);
#pragma unroll
    for (int k = 0; k < 8; ++k) part = std::fma(x[k], factors[k], part);
    total += part;
  }

  // A warp's row times `right`, in every lane; whole runs of eight go to the stage. `together` of
  // them are loaded before any is used.
  __device__ A product(int64_t i, int row, bool wide) const {
    constexpr int together = sizeof(A) == 8 ? 2 : 4, apart = 8 * warp;
    const int64_t own = threadIdx.x % warp * 8, whole = wide ? w.columns - 7 : 0;
    A x[8], total = 0;
#pragma unroll 1
    for (int64_t j = own; j < whole; j += together * apart) {
      Eight<A> raw[together];
#pragma unroll
      for (int r = 0; r < together; ++r) {
        const int64_t at = j + r * apart;
        if (at < whole) raw[r].load(w.address(i, at), w.type, 0, 4);
      }
#pragma unroll
      for (int r = 0; r < together; ++r) {
        const int64_t at = j + r * apart;
        if (at >= whole) break;
        char* const kept = reinterpret_cast<char*>(stage.at(row, at / 8, w.type));
        if (at / 8 < stage.runs) raw[r].store(kept, w.type, 0, 4);
        raw[r].get(w.type, x);
#pragma unroll
        for (int k = 0; k < 8; ++k) x[k] = w.scaled(x[k]);
        add(x, at, total);
      }
    }
    const int64_t done = own < whole ? (whole - 1 - own) / apart + 1 : 0;
#pragma unroll 1
    for (int64_t j = own + done * apart; j < w.columns; j += apart) {
      w.spread(i, j, 1, x);
      add(x, j, total);
    }
    return warp_sum(total);
  }

  // A warp has a row; then a thread has runs of eight columns of all eight rows.
  __device__ void rows() {
    ORTHONORM_SHARED(A, found, power_warps);
    const int own = threadIdx.x / warp;
    const bool wide = w.wide();
    for (int64_t row = first; row < end; row += power_warps) {
      const int count = static_cast<int>(end - row < power_warps ? end - row : power_warps);
      const A total = own < count ? product(row + own, own, wide) : A(0);
      if (threadIdx.x % warp == 0) found[own] = total;
      __syncthreads();
      const A kept = take(found, count, row);
      const power::Shift<A> unit(power == lowest_power ? 0 : power);
#pragma unroll 1
      for (int64_t j = 8 * threadIdx.x; j < w.columns; j += 8 * power_threads) {
        A sum[8] = {};
        if (row != first) {
          read_eight(sums + j, sum);
#pragma unroll
          for (int k = 0; k < 8; ++k) sum[k] = sum[k] * kept;
        }
        A x[8];
        const auto take_row = [&](int r) {
          const A factor = unit(found[r]);
#pragma unroll
          for (int k = 0; k < 8; ++k) sum[k] = std::fma(x[k], factor, sum[k]);
        };
        const bool whole = wide && j + 8 <= w.columns;
#pragma unroll 2
        for (int r = 0; whole && r < count; ++r) {
          again(w, row + r, j, r, stage, x);
          take_row(r);
        }
#pragma unroll 1
        for (int r = 0; !whole && r < count; ++r) {
          w.spread(row + r, j, 1, x);
          take_row(r);
        }
        write_eight(sums + j, sum);
#pragma unroll
        for (int k = 0; k < 8; ++k) sound = sound && finite(sum[k]);
      }
      __syncthreads();  // before the next rows' y and stage
    }
  }

  // A lane has a row, a warp every eighth column, eight of them at a time.
  __device__ void columns() {
    ORTHONORM_SHARED(A, parts, power_threads);
    ORTHONORM_SHARED(A, found, warp);
    constexpr int together = 8 * power_warps;
    const int own = threadIdx.x / warp, lane = threadIdx.x % warp;
    const int count = static_cast<int>(end - first);
    A x[8] = {}, total = 0;
    for (int64_t j = own; j < w.columns && lane < count; j += together) {
      A part = 0;
      w.spread(first + lane, j, power_warps, x);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int64_t at = j + k * power_warps;
        if (at < w.columns) part = std::fma(x[k], right[at], part);
      }
      total += part;
    }
    parts[threadIdx.x] = total;
    __syncthreads();
    if (own == 0) {
      for (int i = 1; i < power_warps; ++i) total += parts[i * warp + lane];
      found[lane] = total;
    }
    __syncthreads();
    take(found, count, first);
    const power::Shift<A> unit(power == lowest_power ? 0 : power);
    const A factor = unit(found[lane]);
#pragma unroll 1
    for (int64_t j = own; j < w.columns; j += together) {
      if (lane < count) w.spread(first + lane, j, power_warps, x);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int64_t at = j + k * power_warps;
        const A sum = warp_sum(lane < count && at < w.columns ? x[k] * factor : A(0));
        if (lane == 0 && at < w.columns) sums[at] = sum;
        sound = sound && finite(sum);
      }
    }
    __syncthreads();
  }
};

// Rows [first, end) of W, whose sums and exponents are the tile's.
template <class A>
__device__ inline void sweep(Operand<A> w, int64_t first, int64_t end, const A* right,
                             const Stage& stage, A* y, A* sums, Powers& powers, double& squares) {
  int shift = 0;
#pragma unroll 1
  for (;;) {
    Sweeping<A> tile{w, right, y, sums, stage, first, end};
    const bool fits = tile.run();
    if (!fits && !w.shifted) {
      const double largest = peak_of(w, first, end);
      shift = largest == 0 ? lowest_power : 0;
      if (largest != 0 && finite(largest)) {
        shift = std::ilogb(largest);
        w.shift = power::Shift<A>(shift);
        w.shifted = true;
        continue;
      }
    }
    if (threadIdx.x != 0) return;
    powers = {shift, tile.power == lowest_power ? 0 : tile.power};
    squares = tile.squares;
    return;
  }
}

}  // namespace orthonorm::cuda
