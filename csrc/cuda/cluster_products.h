// Products of matrices whose rows lie spread over the blocks of a cluster, on tensor cores.
//
// Block r keeps rows r tile to (r + 1) tile - 1 of every matrix in shared memory, its strip. A
// product's left factor is then at home. Of the right one a block takes squares of tile x tile from
// where they lie, through registers into one of two places of its own while the other is
// multiplied. A symmetric result is formed as in a block (small_products.h) with blocks for warps:
// block r forms its squares r, r + 1, ..., r + blocks / 2, counted round, and writes each also
// where its mirror image belongs. Sums stay in registers until the whole cluster has read the
// factors. Blocks without rows of the matrix wait at the barriers. What this is good for by
// arithmetic: README.md.
#pragma once

#include "small_products.h"

namespace orthonorm::cuda {

// `cluster_blocks` blocks with `block_rows` rows each of matrices of up to `side` rows.
template <class Number16, int cluster_blocks, int block_rows = 64>
struct Strips {
  using T = Number16;
  static constexpr int blocks = cluster_blocks, tile = block_rows, side = tile;
  static constexpr int across = tile / 16;  // warps: each has 32 rows and 16 columns of a square
  static constexpr int threads = tile / 32 * across * 32;
  static constexpr int ld = blocks * tile + 8, square_ld = tile + 8;
  static constexpr int most = blocks / 2 + 1;  // squares of a symmetric result in one block
  static constexpr int most_wide = 8;          // of a wide matrix
  static constexpr int square = tile * square_ld;
  static constexpr int bytes(int ld) { return tile * ld * 2; }  // of rows of `ld` numbers
  static constexpr int staged_bytes = 2 * square * 2;

  // Columns kept of a wide matrix, zero beyond its own.
  ORTHONORM_HD static int columns(int own) { return (own + tile - 1) / tile * tile; }
};

// What a block may have of shared memory: CLUSTER_BYTES of ops/words.py, or all there is on sm_90.
template <class S>
inline constexpr int most_shared = S::blocks <= 4 ? 119808 : 232448;

// What a block has of its matrix, and the squares on their way.
template <class S>
struct Share {
  int rank, strips;  // of the blocks, and how many of them have rows
  typename S::T* staged;

  __device__ Share(int own, int rows, typename S::T* memory)
      : rank(own), strips((rows + S::tile - 1) / S::tile), staged(memory) {}

  // The strip whose square `i` of this block's row of squares lies in.
  __device__ int column(int i) const {
    const int strip = rank + i;
    return strip < strips ? strip : strip - strips;
  }
};

// sums[i] += left square(k, i) over all k, squares' columns of the left factor in turn from the
// block's own on: left of `chunks` squares, `count` of them formed. `turned`: times the transpose.
template <class S, bool turned, int most, class T, class Square>
__device__ inline void add_products(float (&sums)[most][2][2][4], const Share<S>& share,
                                    const T* left, int left_ld, int right_ld, int chunks, int count,
                                    const Square& square) {
  const int warp = threadIdx.x / 32, lane_row = threadIdx.x / (S::tile / 8);
  const int first_row = warp / S::across * 32, first_column = warp % S::across * 16;
  const int piece = threadIdx.x % (S::tile / 8) * 8, half = S::tile / 2;
  uint4 ahead[2];  // of the next square, a thread's part
  const auto take = [&](int k, int i) {
    const T* const from = square(k, i) + lane_row * right_ld + piece;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      ahead[h] = *reinterpret_cast<const uint4*>(from + h * half * right_ld);
    }
  };
  T* to = share.staged;
  int k = share.rank % chunks;
  if (count > 0) take(k, 0);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks && count > 0; ++chunk) {
    const int next = k + 1 < chunks ? k + 1 : 0;
#pragma unroll
    for (int i = 0; i < most; ++i) {
      if (i >= count) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<uint4*>(to + (lane_row + h * half) * S::square_ld + piece) = ahead[h];
      }
      __syncthreads();  // all have also left the other place, which comes next
      if (i + 1 < count) {
        take(k, i + 1);
      } else if (chunk + 1 < chunks) {
        take(next, 0);
      }
#pragma unroll
      for (int depth = 0; depth < S::tile; depth += 16) {
        uint32_t rows[2][4], right[4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          load_left(rows[j], left, left_ld, first_row + 16 * j, k * S::tile + depth);
        }
        if constexpr (turned) {
          load_right(right, to, S::square_ld, first_column, depth);
        } else {
          load_right_rows(right, to, S::square_ld, depth, first_column);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          multiply_add<T>(sums[i][j][0], rows[j], right[0], right[1]);
          multiply_add<T>(sums[i][j][1], rows[j], right[2], right[3]);
        }
      }
      to = to == share.staged ? share.staged + S::square : share.staged;
    }
    k = next;
  }
}

// f(row, column, sum) of a thread's sums of square i, two at a time side by side.
template <class S, int most, class F>
__device__ inline void each_pair(float (&sums)[most][2][2][4], int i, const F& f) {
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const Place at(warp / S::across * 32 + 16 * j, warp % S::across * 16 + 8 * k);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        f(at.row + 8 * h, at.column, sums[i][j][k][2 * h], sums[i][j][k][2 * h + 1]);
      }
    }
  }
}

// to = alpha left right^T + beta old, symmetric bit for bit, of symmetric products; without
// `old` the product alone. Rows of the factors have `depth` numbers, a multiple of the tile.
template <class S, class T>
__device__ inline void symmetric_sum(const Share<S>& share, T* to, const T* old, const T* left,
                                     const T* right, int ld, int depth, float alpha, float beta) {
  // The square halfway round is its own mirror's: the lower half of the strips has it.
  const bool upper = share.strips % 2 == 0 && share.rank >= share.strips / 2;
  const int count = share.rank < share.strips ? share.strips / 2 + (upper ? 0 : 1) : 0;
  float sums[S::most][2][2][4] = {};
  add_products<S, true>(sums, share, left, ld, ld, depth / S::tile, count, [&](int k, int i) {
    return of_rank(right, share.column(i)) + k * S::tile;
  });
  cluster_sync();
#pragma unroll
  for (int i = 0; i < S::most; ++i) {
    if (i >= count) break;
    const int strip = share.column(i);
    T* const mirror = of_rank(to, strip) + share.rank * S::tile;
    each_pair<S>(sums, i, [&](int r, int c, float first, float second) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (i == 0 && r < c + e) continue;
        const int at = r * S::ld + strip * S::tile + c + e;
        float x = alpha * (e == 0 ? first : second);
        if (old) x = fmaf(beta, widened(old[at]), x);
        to[at] = mirror[(c + e) * S::ld + r] = rounded<T>(x);
      }
    });
  }
  cluster_sync();
}

// X <- a X + B X, X of `columns`, a multiple of the tile.
template <class S, class T>
__device__ inline void apply(const Share<S>& share, T* X, int ld, int columns, const T* B,
                             float a) {
  const int count = share.rank < share.strips ? columns / S::tile : 0;
  float sums[S::most_wide][2][2][4];
#pragma unroll
  for (int i = 0; i < S::most_wide; ++i) {
    each_pair<S>(sums, i, [&](int r, int c, float& x, float& y) {
      uint32_t pair = 0;
      if (i < count) pair = *reinterpret_cast<const uint32_t*>(X + r * ld + i * S::tile + c);
      x = a * widened(T{static_cast<uint16_t>(pair)});
      y = a * widened(T{static_cast<uint16_t>(pair >> 16)});
    });
  }
  add_products<S, false>(sums, share, B, S::ld, ld, share.strips, count, [&](int k, int i) {
    return of_rank(X, k) + i * S::tile;
  });
  cluster_sync();
#pragma unroll
  for (int i = 0; i < S::most_wide; ++i) {
    if (i >= count) break;
    each_pair<S>(sums, i, [&](int r, int c, float x, float y) {
      store_pair(X + r * ld + i * S::tile + c, x, y);
    });
  }
  cluster_sync();
}

}  // namespace orthonorm::cuda
