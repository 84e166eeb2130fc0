// Power iteration between and around sweeps: device part. `power_lists.h` makes tables and launches.
//
// A step is a chain of three phases, each of which needs all of the one before: tiles are swept;
// their shares of W^T y are added, in the order of the tiles; vectors are divided by their norms.
// For matrices of many tiles a phase is a launch of its own. One launch for a whole step, its
// blocks meeting at a grid barrier, was left: it can run only as many blocks as are resident at a
// time, which a ragged list exceeds, needs a cooperative launch, and saves two boundaries of kernels
// that a barrier of the same cost replaces. Matrices of few tiles have a block each, which goes
// through all phases of all steps in one launch, to the same bits.
#pragma once

#include "power_sweep.h"

namespace orthonorm::cuda {

// A batch of matrices and their vectors: "left" has a number per row, "right" one per column.
struct PowerEntry {
  char *w, *left, *right;
  int64_t rows, columns;
  int64_t w_stride[3], left_stride[2], right_stride[2];  // batch, then along
  int64_t memory, bytes;                // scratch before; of a matrix
  uint32_t first_tile, tiles;           // tiles before; of a matrix
  uint32_t first_block, blocks;         // blocks of lanes before; of a matrix
  uint32_t first_matrix;                // of the table
  int32_t place;                        // matrices of the list before
  Element type, left_type, right_type;
};

struct PowerTable {
  static constexpr int most_entries = (16384 - 32) / static_cast<int>(sizeof(PowerEntry));
  int32_t entries_used = 0;
  uint32_t tiles = 0, blocks = 0, matrices = 0;
  int64_t bytes = 0, stage = 0;  // of scratch, of shared memory
  PowerEntry entries[most_entries];
};

struct PowerRule {
  int64_t steps;
  double eps;
};

// The scratch of one matrix, cut up; without memory it only counts.
template <class A>
struct PowerMemory {
  double *z, *squares, *z_squares;  // of columns; of tiles; of blocks of lanes
  Powers* powers;                   // of tiles
  int* moved;                       // whether a step replaced left, and right
  A *left, *right, *y, *sums;
  int64_t width, bytes;             // of a tile's sums

  __device__ __host__ PowerMemory(char* memory, const PowerEntry& e) {
    char* at = memory;
    width = (e.columns + 7) / 8 * 8;
    take(at, z, e.columns);
    take(at, squares, e.tiles);
    take(at, z_squares, e.blocks);
    take(at, powers, e.tiles);
    take(at, moved, 2);
    take(at, left, e.rows);
    take(at, right, width);
    take(at, y, e.rows);
    take(at, sums, width * e.tiles);
    bytes = at - memory;
  }

 private:
  template <class T>
  __device__ __host__ static void take(char*& at, T*& array, int64_t count) {
    array = reinterpret_cast<T*>(at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  }
};

// A number times 2^exponent, 0 where that is too small to matter.
__device__ inline double scaled(double x, int exponent) {
  return exponent < -1022 ? 0 : x * power_of_two(exponent);
}

// The norms of a step so far, in units of 2^exponent; the same in every thread.
struct Norms {
  int exponent = lowest_power;
  double y = 0, z = 0, eps = 0;

  __device__ static double divisor(double norm, double eps) { return norm < eps ? eps : norm; }
};

template <class A>
struct PowerMatrix {
  const PowerEntry& e;
  const int64_t b;
  const PowerMemory<A> m;

  __device__ PowerMatrix(const PowerEntry& entry, int64_t matrix, char* scratch)
      : e(entry), b(matrix), m(scratch + e.memory + b * e.bytes, e) {}

  __device__ Operand<A> operand() const {
    const char* w = e.w + b * e.w_stride[0] * size_of(e.type);
    return {w, e.rows, e.columns, e.w_stride[1], e.w_stride[2], e.type};
  }

  __device__ char* lane(const char* data, const int64_t* stride, Element type, int64_t i) const {
    return const_cast<char*>(data) + (b * stride[0] + i * stride[1]) * size_of(type);
  }
  __device__ char* left(int64_t i) const { return lane(e.left, e.left_stride, e.left_type, i); }
  __device__ char* right(int64_t j) const {
    return lane(e.right, e.right_stride, e.right_type, j);
  }

  __device__ void start(uint32_t block) const {
    const int64_t i = int64_t{block} * power_threads + threadIdx.x;
    if (i < e.rows) m.left[i] = load<A>(left(i), e.left_type);
    if (i < m.width) m.right[i] = i < e.columns ? load<A>(right(i), e.right_type) : A(0);
    if (i < 2) m.moved[i] = 0;
  }

  __device__ void tile(uint32_t t, const Stage& stage) const {
    const int64_t first = int64_t{t} * power_rows, end = first + power_rows;
    sweep<A>(operand(), first, end < e.rows ? end : e.rows, m.right, stage, m.y,
             m.sums + t * m.width, m.powers[t], m.squares[t]);
  }

  __device__ Norms product(double eps) const {
    Norms n;
    for (uint32_t t = threadIdx.x % warp; t < e.tiles; t += warp) {
      n.exponent = m.powers[t].shift > n.exponent ? m.powers[t].shift : n.exponent;
    }
    n.exponent = warp_max(n.exponent);
    double sum = 0;
    for (uint32_t t = threadIdx.x % warp; t < e.tiles; t += warp) {
      sum += scaled(m.squares[t], 2 * (m.powers[t].shift - n.exponent));
    }
    n.y = std::sqrt(warp_sum(sum));
    const double limit = std::ldexp(eps, -n.exponent);
    n.eps = limit < HUGE_VAL ? limit : 0x1p1023;
    return n;
  }

  __device__ double y(int64_t i, const Norms& n) const {
    return scaled(m.y[i], m.powers[i / power_rows].shift - n.exponent);
  }

  // z = W^T u by the tiles' shares, or where y is zero by the old u; its squares.
  __device__ void combine(uint32_t block, double eps) const {
    const Norms n = product(eps);
    const int64_t j = int64_t{block} * power_threads + threadIdx.x;
    double z = 0;
    if (j < e.columns && n.y != 0) {
#pragma unroll 16  // loads in flight: a matrix has few such blocks
      for (uint32_t t = 0; t < e.tiles; ++t) {
        const Powers p = m.powers[t];
        z += scaled(m.sums[t * m.width + j], 2 * (p.shift - n.exponent) + p.y);
      }
      z /= Norms::divisor(n.y, n.eps);
    } else if (j < e.columns) {
      const Operand<A> w = operand();
      const power::Shift<double> shift(n.exponent == lowest_power ? 0 : n.exponent);
#pragma unroll 1
      for (int64_t i = 0; i < e.rows; ++i) {
        z += shift(static_cast<double>(w.at(i, j))) * static_cast<double>(m.left[i]);
      }
    }
    if (j < e.columns) m.z[j] = z;
    const double sum = block_sum<power_threads>(z * z);
    if (threadIdx.x == 0) m.z_squares[block] = sum;
  }

  // u and v of a step; the last one's to where they belong, if all is finite, with sigma.
  __device__ void vectors(uint32_t block, double eps, bool last, char* sigma, Element type) const {
    Norms n = product(eps);
    double sum = 0;
    for (uint32_t k = threadIdx.x % warp; k < e.blocks; k += warp) sum += m.z_squares[k];
    n.z = std::sqrt(warp_sum(sum));
    const int64_t i = int64_t{block} * power_threads + threadIdx.x;
    if (i < e.rows && n.y != 0) {
      m.left[i] = static_cast<A>(y(i, n) / Norms::divisor(n.y, n.eps));
    }
    if (i < e.columns && n.z != 0) {
      m.right[i] = static_cast<A>(m.z[i] / Norms::divisor(n.z, n.eps));
    }
    if (!last) {
      if (i == 0 && n.y != 0) m.moved[0] = 1;
      if (i == 0 && n.z != 0) m.moved[1] = 1;
      return;
    }
    const double found = n.z == 0 ? 0 : n.z * (n.z / Norms::divisor(n.z, n.eps));
    if (i == 0) write_sigma(found, n.exponent, sigma, type);
    if (!finite(found) || !finite(n.y)) return;
    if (i < e.rows && (n.y != 0 || m.moved[0])) store(left(i), e.left_type, m.left[i]);
    if (i < e.columns && (n.z != 0 || m.moved[1])) store(right(i), e.right_type, m.right[i]);
  }

  // sigma = u . W v of the vectors that are there.
  __device__ void evaluate(char* sigma, Element type) const {
    const Norms n = product(0);
    double dot = 0;
    for (int64_t i = threadIdx.x; i < e.rows; i += power_threads) {
      dot += static_cast<double>(m.left[i]) * y(i, n);
    }
    dot = block_sum<power_threads>(dot);
    if (threadIdx.x == 0) write_sigma(dot, n.exponent, sigma, type);
  }

 private:
  // `sigmas` begins with the first matrix of the list.
  __device__ void write_sigma(double x, int exponent, char* sigmas, Element type) const {
    const int64_t at = e.place + b;
    const double sigma = finite(x) ? std::ldexp(x, exponent) : x - x;
    store(sigmas + at * size_of(type), type, sigma);
  }
};

// Every tile of a table.
template <class A>
__global__ void __launch_bounds__(power_threads, 1)  // unasked, nvcc spills to fit two (2026-11)
    power_sweep_kernel(ORTHONORM_CONSTANT(PowerTable) table, char* scratch) {
  ORTHONORM_DYNAMIC_SHARED(uint4, kept);
  const PowerEntry& e = locate<&PowerEntry::first_tile>(table, blockIdx.x);
  const uint32_t inside = blockIdx.x - e.first_tile;
  const int64_t row = power_warps * size_of(e.type) * int64_t{8};
  PowerMatrix<A>(e, inside / e.tiles, scratch).tile(inside % e.tiles, {kept, table.stage / row});
}

enum class Phase { start, combine, vectors, last, evaluate };

// Another phase of every matrix of a table.
template <class A, Phase phase>
__global__ void __launch_bounds__(power_threads)
    power_kernel(ORTHONORM_CONSTANT(PowerTable) table, double eps, char* scratch, char* sigmas,
                 Element type) {
  if constexpr (phase == Phase::evaluate) {
    const PowerEntry& e = locate<&PowerEntry::first_matrix>(table, blockIdx.x);
    PowerMatrix<A>(e, blockIdx.x - e.first_matrix, scratch).evaluate(sigmas, type);
  } else {
    const PowerEntry& e = locate<&PowerEntry::first_block>(table, blockIdx.x);
    const uint32_t inside = blockIdx.x - e.first_block, block = inside % e.blocks;
    const PowerMatrix<A> matrix(e, inside / e.blocks, scratch);
    if constexpr (phase == Phase::start) matrix.start(block);
    if constexpr (phase == Phase::combine) matrix.combine(block, eps);
    if constexpr (phase == Phase::vectors || phase == Phase::last) {
      matrix.vectors(block, eps, phase == Phase::last, sigmas, type);
    }
  }
}

// All phases of a matrix by one block.
template <class A>
__global__ void __launch_bounds__(power_threads, 1)
    small_power_kernel(ORTHONORM_CONSTANT(PowerTable) table, PowerRule rule, char* scratch,
                       char* sigmas, Element type) {
  ORTHONORM_DYNAMIC_SHARED(uint4, kept);
  const PowerEntry& e = locate<&PowerEntry::first_matrix>(table, blockIdx.x);
  const PowerMatrix<A> matrix(e, blockIdx.x - e.first_matrix, scratch);
  const Stage stage{kept, table.stage / (power_warps * size_of(e.type) * int64_t{8})};
  const auto all = [](uint32_t count, const auto& part) {
    for (uint32_t i = 0; i < count; ++i) {
      part(i);
      __syncthreads();
    }
  };
  all(e.blocks, [&](uint32_t i) { matrix.start(i); });
  for (int64_t step = 0; step < rule.steps; ++step) {
    const bool last = step + 1 == rule.steps;
    all(e.tiles, [&](uint32_t i) { matrix.tile(i, stage); });
    all(e.blocks, [&](uint32_t i) { matrix.combine(i, rule.eps); });
    all(e.blocks, [&](uint32_t i) { matrix.vectors(i, rule.eps, last, sigmas, type); });
  }
  if (rule.steps > 0) return;
  all(e.tiles, [&](uint32_t i) { matrix.tile(i, stage); });
  matrix.evaluate(sigmas, type);
}

}  // namespace orthonorm::cuda
