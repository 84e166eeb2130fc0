// Products of matrices that one block keeps in shared memory, on tensor cores.
//
// Rows are eight numbers longer than the matrix: their addresses then differ by an odd multiple of
// 16 bytes, so that the eight rows of a load fall into eight groups of banks, and so do mirrored
// stores of two bytes. Sums stay in registers until every warp has read the factors, so results may
// replace them. A symmetric result is formed in blocks of a warp's rows, each pair of mirrored ones
// once: warp w takes the blocks w, w + 1, ..., w + warps / 2 of its rows, counted round. By four
// warps that is 10 of 16 blocks' work where each has at most 3 of its 4.
#pragma once

#include "mma.h"

namespace orthonorm::cuda {

// A block of `warps`, each with `tiles` times 16 rows of matrices of up to `side` rows.
template <class Number16, int block_warps, int warp_tiles>
struct Small {
  using T = Number16;
  static constexpr int warps = block_warps, tiles = warp_tiles;
  static constexpr int threads = 32 * warps, rows = 16 * tiles, side = rows * warps;
  static constexpr int ld = side + 8;            // of a square matrix
  static constexpr int chunk = side > 32 ? 64 : 32;  // columns whose sums the registers hold
  static constexpr int square_bytes = side * ld * 2;

  // Columns kept of a wide matrix, zero beyond its own.
  ORTHONORM_HD static int columns(int own) { return (own + chunk - 1) / chunk * chunk; }
};

// Rows `first` to first + 15 and columns from k on, as the left factor of a product.
template <class T>
__device__ inline void load_left(uint32_t (&to)[4], const T* from, int ld, int first, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices(to, from + (first + lane % 16) * ld + k + lane / 16 * 8);
}

// The same part's transpose, as two right factors.
template <class T>
__device__ inline void load_right(uint32_t (&to)[4], const T* from, int ld, int first, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices(to, from + (first + lane / 16 * 8 + lane % 8) * ld + k + lane / 8 % 2 * 8);
}

// Rows k to k + 15 and columns from `first` on, as two right factors.
template <class T>
__device__ inline void load_right_rows(uint32_t (&to)[4], const T* from, int ld, int k, int first) {
  const int lane = threadIdx.x % 32;
  load_transposes(to, from + (k + lane % 16) * ld + first + lane / 16 * 8);
}

template <class T>
__device__ inline void store_pair(T* to, float x, float y) {
  const uint32_t low = rounded<T>(x).bits, high = rounded<T>(y).bits;
  *reinterpret_cast<uint32_t*>(to) = low | high << 16;
}

// Where a lane's sums of a 16 x 8 tile lie: rows `row` and 8 below, columns `column` and the next.
struct Place {
  int row, column;
  __device__ Place(int first_row, int first_column)
      : row(first_row + threadIdx.x % 32 / 4), column(first_column + 2 * (threadIdx.x % 4)) {}
};

// to = alpha left right^T + beta old, symmetric bit for bit, of symmetric products; without
// `old` the product alone. Rows of the factors have `depth` numbers.
template <class S, class T>
__device__ inline void symmetric_sum(T* to, const T* old, const T* left, const T* right, int ld,
                                     int depth, float alpha, float beta) {
  constexpr int blocks = S::warps / 2 + 1;
  const int warp = threadIdx.x / 32;
  const auto column_of = [&](int block) { return (warp + block) % S::warps * S::rows; };
  // The block halfway round is its own mirror's: the lower half of the warps has it.
  const int own = S::warps > 1 && warp >= S::warps / 2 ? blocks - 1 : blocks;
  float sums[blocks][S::tiles][2 * S::tiles][4] = {};
#pragma unroll 2
  for (int k = 0; k < depth; k += 16) {
    uint32_t rows[S::tiles][4];
#pragma unroll
    for (int i = 0; i < S::tiles; ++i) load_left(rows[i], left, ld, warp * S::rows + 16 * i, k);
#pragma unroll
    for (int block = 0; block < blocks; ++block) {
      if (block >= own) break;
#pragma unroll
      for (int j = 0; j < S::tiles; ++j) {
        uint32_t columns[4];
        load_right(columns, right, ld, column_of(block) + 16 * j, k);
#pragma unroll
        for (int i = 0; i < S::tiles; ++i) {
          multiply_add<T>(sums[block][i][2 * j], rows[i], columns[0], columns[1]);
          multiply_add<T>(sums[block][i][2 * j + 1], rows[i], columns[2], columns[3]);
        }
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int block = 0; block < blocks; ++block) {
    if (block >= own) break;
#pragma unroll
    for (int i = 0; i < S::tiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * S::tiles; ++j) {
        const Place at(warp * S::rows + 16 * i, column_of(block) + 8 * j);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = at.row + e / 2 * 8, c = at.column + e % 2;
          if (block == 0 && r < c) continue;
          float x = alpha * sums[block][i][j][e];
          if (old) x = fmaf(beta, widened(old[r * S::ld + c]), x);
          to[r * S::ld + c] = to[c * S::ld + r] = rounded<T>(x);
        }
      }
    }
  }
  __syncthreads();
}

// X <- a X + B X, X of `columns` (a multiple of S::chunk).
template <class S, class T>
__device__ inline void apply(T* X, int ld, int columns, const T* B, float a) {
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int first = 0; first < columns; first += S::chunk) {
    float sums[S::tiles][S::chunk / 8][4];
    const auto each_pair = [&](const auto& f) {
#pragma unroll
      for (int i = 0; i < S::tiles; ++i) {
#pragma unroll
        for (int j = 0; j < S::chunk / 8; ++j) {
          const Place at(warp * S::rows + 16 * i, first + 8 * j);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            f(X + (at.row + 8 * h) * ld + at.column, sums[i][j][2 * h], sums[i][j][2 * h + 1]);
          }
        }
      }
    };
    each_pair([&](const T* from, float& x, float& y) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
      x = a * widened(T{static_cast<uint16_t>(pair)});
      y = a * widened(T{static_cast<uint16_t>(pair >> 16)});
    });
#pragma unroll 2
    for (int k = 0; k < S::side; k += 16) {
      uint32_t rows[S::tiles][4];
#pragma unroll
      for (int i = 0; i < S::tiles; ++i) load_left(rows[i], B, S::ld, warp * S::rows + 16 * i, k);
#pragma unroll
      for (int j = 0; j < S::chunk / 16; ++j) {
        uint32_t right[4];
        load_right_rows(right, X, ld, k, first + 16 * j);
#pragma unroll
        for (int i = 0; i < S::tiles; ++i) {
          multiply_add<T>(sums[i][2 * j], rows[i], right[0], right[1]);
          multiply_add<T>(sums[i][2 * j + 1], rows[i], right[2], right[3]);
        }
      }
    }
    __syncthreads();  // columns of other chunks are not touched
    each_pair([&](T* to, float& x, float& y) { store_pair(to, x, y); });
  }
  __syncthreads();
}

}  // namespace orthonorm::cuda
