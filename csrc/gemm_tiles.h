// The innermost loops: tiles of sums in registers, and strips of tiles finished; torch-free.
//
// A tile is 4 QUADS rows by VECTORS registers of columns. Rows are read by broadcasts, four from
// one panel of L: a quad never straddles two panels, whose width is a multiple of four.
#pragma once

#include "gemm_pack.h"
#include "cpu/isa.h"

#if ORTHONORM_X86
#include <immintrin.h>
#endif

namespace orthonorm::gemm {

// Lanes summed in registers before they are added to memory. Errors of long sums of one sign grow
// with the length of a chunk, not of the depth: in float32 a Gram matrix is as exact as MKL's with
// 128, up to 2.4 times worse with 256; the additions cost about two percent. In float64, where
// torch's products of vectors have many sums side by side, it takes 32 (2026-11).
template <class Lane>
inline constexpr int64_t CHUNK = sizeof(Lane) == 8 ? 32 : 128;
// Lanes ahead of their use that rows of L are fetched at: 5 to 10 percent when they come from L3
// (2026-11). Panels of R are in L2, where fetching ahead gained nothing.
inline constexpr int64_t AHEAD = 16;

// out[r WIDTH + c] (+)= sum over k < depth of quad[r / 4][k WIDTH + r % 4] * panel[k WIDTH + c],
// added to what is there if `more`. Both compilers keep all sums in registers.
template <class Lane, int BYTES, int WIDTH, int QUADS, int VECTORS>
ORTHONORM_INLINE void tile(
    const Lane* const* quads, const Lane* panel, int64_t depth, bool more, Lane* out) {
  using V = Vector<Lane, BYTES>;
  constexpr int W = BYTES / sizeof(Lane), ROWS = 4 * QUADS;
  const Lane* quad[QUADS];
#pragma GCC unroll 4
  for (int q = 0; q < QUADS; ++q) quad[q] = quads[q];
  do {
    V sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = V{};
    }
    const int64_t lanes = std::min(CHUNK<Lane>, depth);
    for (int64_t k = 0; k < lanes; ++k) {
      V columns[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) load(panel + v * W, columns[v]);
      __builtin_prefetch(quad[0] + AHEAD * WIDTH);
      __builtin_prefetch(quad[QUADS - 1] + AHEAD * WIDTH);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const Lane row = quad[r / 4][r % 4];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[r][v] += row * columns[v];
      }
      panel += WIDTH;
#pragma GCC unroll 4
      for (int q = 0; q < QUADS; ++q) quad[q] += WIDTH;
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        V before{};
        if (more) load(out + r * WIDTH + v * W, before);
        sum[r][v] += before;
        save(out + r * WIDTH + v * W, sum[r][v]);
      }
    }
    more = true;
    depth -= lanes;
  } while (depth > 0);
}

#if ORTHONORM_X86
// The same for pairs of bfloat16: two products a lane, summed in float32.
template <int WIDTH, int QUADS, int VECTORS>
ORTHONORM_AVX512BF16 [[gnu::noinline]] void tile_pairs(
    const Pair* const* quads, const Pair* panel, int64_t depth, bool more, float* out) {
  constexpr int ROWS = 4 * QUADS;
  const Pair* quad[QUADS];
#pragma GCC unroll 4
  for (int q = 0; q < QUADS; ++q) quad[q] = quads[q];
  do {
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    const int64_t lanes = std::min(CHUNK<Pair>, depth);
    for (int64_t k = 0; k < lanes; ++k) {
      __m512bh columns[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        columns[v] = (__m512bh)_mm512_loadu_si512(panel + 16 * v);
      }
      __builtin_prefetch(quad[0] + AHEAD * WIDTH);
      __builtin_prefetch(quad[QUADS - 1] + AHEAD * WIDTH);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int>(quad[r / 4][r % 4].bits));
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, columns[v]);
        }
      }
      panel += WIDTH;
#pragma GCC unroll 4
      for (int q = 0; q < QUADS; ++q) quad[q] += WIDTH;
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        float* to = out + r * WIDTH + 16 * v;
        if (more) sum[r][v] = _mm512_add_ps(sum[r][v], _mm512_loadu_ps(to));
        _mm512_storeu_ps(to, sum[r][v]);
      }
    }
    more = true;
    depth -= lanes;
  } while (depth > 0);
}
#endif

// sums <- alpha sums + beta E over a strip, E packed like a panel or null.
template <class S, int64_t COUNT>
ORTHONORM_INLINE void combine(S* sums, S alpha, const S* E, S beta) {
  if (E == nullptr) {
    for (int64_t i = 0; i < COUNT; ++i) sums[i] = alpha * sums[i];
  } else {
    for (int64_t i = 0; i < COUNT; ++i) sums[i] = alpha * sums[i] + beta * E[i];
  }
}

// A block of `rows` x `cols` values, `STEP` apart in `from`, rounded into D.
template <class S, class O, int STEP>
ORTHONORM_INLINE void store(const S* from, int64_t rows, int64_t cols, Strided<O> D) {
  for (int64_t i = 0; i < rows; ++i) {
    const S* line = from + i * STEP;
    O* to = D.at(i, 0);
    if (D.col == 1 && cols == STEP) {
      for (int64_t j = 0; j < STEP; ++j) narrow(line[j], to[j]);
    } else if (D.col == 1) {
      for (int64_t j = 0; j < cols; ++j) narrow(line[j], to[j]);
    } else {
      for (int64_t j = 0; j < cols; ++j) narrow(line[j], to[j * D.col]);
    }
  }
}

// to[c HEIGHT + r] = from[r WIDTH + c].
template <class S, int HEIGHT, int WIDTH, int BYTES>
ORTHONORM_INLINE void turn(const S* from, S* to) {
  constexpr int W = BYTES / sizeof(S);
  for (int i = 0; i < HEIGHT; i += W) {
    for (int j = 0; j < WIDTH; j += W) {
      Vector<S, BYTES> r[W];
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) load(from + (i + k) * WIDTH + j, r[k]);
      transpose(r);
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) save(to + (j + k) * HEIGHT + i, r[k]);
    }
  }
}

}  // namespace orthonorm::gemm
