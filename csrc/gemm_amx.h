// Products on AMX's tiles: layouts, the product itself, and results as operands; torch-free.
//
// A panel is 32 rows or columns. Panels of R are pairs along the depth as they are for vectors, two
// right tiles beside each other. Panels of L are left tiles one after the other:
//   lane (k, i) at panel[k / 16 * 512 + i / 16 * 256 + i % 16 * 16 + k % 16]
// A block of 32 x 32 elements is 2 KB in either, and its transpose is a transpose of words away.
#pragma once

#include "bf16_pairs.h"
#include "cpu/amx.h"
#include "gemm_pack.h"

namespace orthonorm::gemm {

inline constexpr int64_t SQUARE = 2 * TILE;  // side of a block of four tiles, width of a panel

// What a thread must hold while it multiplies.
struct NoTiles {};
template <class Lane>
using TilesOf = std::conditional_t<on_tiles<Lane>, amx::Tiles, NoTiles>;

inline constexpr int64_t BLOCK = SQUARE * TILE;  // words of one

// 16 lines of 16 words, `from` and `to` words apart, transposed.
ORTHONORM_INLINE void turn_words(const void* lines, int64_t from, void* turned, int64_t to) {
  const auto* in = static_cast<const uint32_t*>(lines);
  auto* out = static_cast<uint32_t*>(turned);
  Vector<uint32_t, 64> r[TILE];
#pragma GCC unroll 16
  for (int i = 0; i < TILE; ++i) load(in + i * from, r[i]);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < TILE; ++i) save(out + i * to, r[i]);
}

// A block of left tiles as right tiles of the transpose, and a block of right tiles as left ones.
ORTHONORM_INLINE void turn_rows(const TilePair* block, TilePair* to) {
  for (int64_t half = 0; half < 2; ++half) {
    turn_words(block + half * TILE * TILE, TILE, to + half * TILE, SQUARE);
  }
}
ORTHONORM_INLINE void turn_pairs(const TilePair* block, TilePair* to) {
  for (int64_t half = 0; half < 2; ++half) {
    turn_words(block + half * TILE, SQUARE, to + half * TILE * TILE, TILE);
  }
}

// Left tiles of `count` <= 32 rows.
template <int BYTES>
ORTHONORM_INLINE void pack_left_tiles(const Bf16* from, int64_t stride_i, int64_t stride_k,
                                      int64_t count, int64_t depth, TilePair* to) {
  constexpr int64_t LINE = 2 * TILE;
  const int64_t whole = stride_k == 1 ? depth / LINE : 0;
  for (int64_t i = 0; i < SQUARE; ++i) {
    for (int64_t b = 0; b < whole; ++b) {
      TilePair* line = to + b * BLOCK + i * TILE;
      if (i < count) {
        std::memcpy(line, from + i * stride_i + b * LINE, sizeof(TilePair) * TILE);
      } else {
        std::memset(line, 0, sizeof(TilePair) * TILE);
      }
    }
  }
  for (int64_t b = whole; b * LINE < depth; ++b) {
    alignas(64) TilePair lanes[BLOCK];
    pack_panel<Bf16, TilePair, SQUARE, BYTES>(from + b * LINE * stride_k, stride_i, stride_k, count,
                                              std::min(LINE, depth - b * LINE), lanes);
    turn_pairs(lanes, to + b * BLOCK);
  }
}

// Operands to fetch while others are multiplied, `lines` cache lines of each that is given.
struct Ahead {
  const TilePair *left = nullptr, *right = nullptr;
  int64_t lines = 0;
};

#if ORTHONORM_HAS_AMX

// out (+)= 16 ROWS rows of L times 16 COLS columns of R, from `left` and `right` on over `depth`
// lanes, added to what is there if `more`.
template <int ROWS, int COLS>
ORTHONORM_AMX [[gnu::noinline]] void multiply_blocks(const TilePair* left, const TilePair* right,
                                                     int64_t depth, bool more, float* out,
                                                     const Ahead& ahead) {
  constexpr int64_t LINE = 4 * TILE, PANEL = 4 * SQUARE;  // bytes to the next line
  float *const beside = out + TILE, *const below = out + TILE * SQUARE;
  asm volatile("" ::: "memory");  // GCC does not know that tiles are loaded from memory
  _tile_zero(0);
  if constexpr (COLS > 1) _tile_zero(1);
  if constexpr (ROWS > 1) _tile_zero(2);
  if constexpr (ROWS > 1 && COLS > 1) _tile_zero(3);
  if (more) {
    _tile_loadd(0, out, PANEL);
    if constexpr (COLS > 1) _tile_loadd(1, beside, PANEL);
    if constexpr (ROWS > 1) _tile_loadd(2, below, PANEL);
    if constexpr (ROWS > 1 && COLS > 1) _tile_loadd(3, below + TILE, PANEL);
  }
  const int64_t step = (ahead.lines * TILE + depth - 1) / std::max<int64_t>(depth, 1);
  for (int64_t k = 0; k < depth; k += TILE) {
    for (int64_t i = k / TILE * step; i < std::min((k / TILE + 1) * step, ahead.lines); ++i) {
      if (ahead.left != nullptr) __builtin_prefetch(ahead.left + i * TILE, 0, 2);
      if (ahead.right != nullptr) __builtin_prefetch(ahead.right + i * TILE, 0, 2);
    }
    _tile_loadd(6, right, PANEL);
    _tile_loadd(4, left, LINE);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (COLS > 1) {
      _tile_loadd(7, right + TILE, PANEL);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (ROWS > 1) {
      _tile_loadd(5, left + TILE * TILE, LINE);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (COLS > 1) _tile_dpbf16ps(3, 5, 7);
    }
    left += SQUARE * TILE;
    right += SQUARE * TILE;
  }
  _tile_stored(0, out, PANEL);
  if constexpr (COLS > 1) _tile_stored(1, beside, PANEL);
  if constexpr (ROWS > 1) _tile_stored(2, below, PANEL);
  if constexpr (ROWS > 1 && COLS > 1) _tile_stored(3, below + TILE, PANEL);
}

inline void multiply_tiles(const TilePair* left, const TilePair* right, int64_t rows, int64_t cols,
                           int64_t depth, bool more, float* out, const Ahead& ahead) {
  const auto by = rows > TILE ? (cols > TILE ? multiply_blocks<2, 2> : multiply_blocks<2, 1>)
                              : (cols > TILE ? multiply_blocks<1, 2> : multiply_blocks<1, 1>);
  by(left, right, depth, more, out, ahead);
}

// 32 x 32 sums rounded, as a block of left tiles: its lines are the rows. Zeros beyond the matrix.
ORTHONORM_AVX512BF16 [[gnu::noinline]] inline void round_rows(const float* sums, int64_t rows,
                                                              int64_t cols, TilePair* block) {
  const uint32_t inside = cols < SQUARE ? (1u << cols) - 1 : ~0u;
  for (int64_t r = 0; r < SQUARE; ++r) {
    const float* row = sums + r * SQUARE;
    const uint32_t kept = r < rows ? inside : 0;
    const __m512 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept), row);
    const __m512 b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept >> TILE), row + TILE);
    _mm512_storeu_si512(block + r * TILE, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
}

// A block of left tiles as a block of right tiles: pairs of rows.
ORTHONORM_AVX512BF16 [[gnu::noinline]] inline void pair_rows(const TilePair* block, TilePair* to) {
  for (int64_t k = 0; k < TILE; ++k) {
    const __m512i even = _mm512_loadu_si512(block + 2 * k * TILE);
    const __m512i odd = _mm512_loadu_si512(block + (2 * k + 1) * TILE);
    const Pairs pairs = join_rows(even, odd);
    _mm512_storeu_si512(to + k * SQUARE, pairs.first);
    _mm512_storeu_si512(to + k * SQUARE + TILE, pairs.last);
  }
}

#endif  // ORTHONORM_HAS_AMX

}  // namespace orthonorm::gemm
