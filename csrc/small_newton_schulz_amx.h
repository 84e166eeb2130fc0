// Newton-Schulz on one small matrix with bfloat16 products on Intel's AMX tiles; torch-free.
//
// The scheme and the roundings of small_newton_schulz_bf16.h. Operands are blocks of 32 x 32, two
// tiles of 1 KB each, zero beyond the matrix; a block's two tiles are
//   left   its upper and its lower 16 rows; lane (i, k / 2) holds columns k and k + 1 of row i
//   right  its left and its right 16 columns; lane (k / 2, j) holds rows k and k + 1 of column j
// Blocks that are summed over lie one behind the other. Products leave their sums in 32 x 32
// floats, of whose rows both layouts are made by rounding and interleaving; X^T, the left factor of
// X^T X, is made of the right layout of X by transposing lanes. All blocks of the symmetric A and B
// are computed: a mirrored block of A would take two such transpositions, and one of B another
// rounding besides one, for the product and the rounding that they save.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/amx.h"
#include "small_newton_schulz_bf16.h"

namespace orthonorm::small {

// Lanes, and floats of sums, of a block.
inline constexpr int64_t amx_lanes = 32 * 16, amx_sums = 32 * 32;

#if ORTHONORM_HAS_AMX

#define ORTHONORM_AMX_INLINE ORTHONORM_AMX [[gnu::always_inline]] inline

struct AmxBuffers {
  int64_t L, S, down, across;  // rows and columns of X, also in blocks
  int64_t ld;
  float* X;     // the result; at first room for a matrix to be scaled in
  float* sums;  // of a block
  uint32_t *X_left, *Y_left;  // take turns
  uint32_t *X_right, *Xt_left, *A_left, *A_right, *B_right;
};

// The sums of a row of blocks times a column of blocks, K of each.
ORTHONORM_AMX_INLINE void block_amx(const uint32_t* left, const uint32_t* right, int64_t K,
                                    float* sums) {
  asm volatile("" ::: "memory");  // GCC does not know that tiles are loaded from memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < K; ++k, left += amx_lanes, right += amx_lanes) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + amx_lanes / 2, 64);
    _tile_loadd(5, left + amx_lanes / 2, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 16 * 32, 128);
  _tile_stored(3, sums + 16 * 32 + 16, 128);
}

// rows x columns blocks of a product, K blocks deep; done(i, j, sums) for each. Finishing a block
// while the next is in the tiles, from other memory or the same, was no faster (n = 32..128,
// 2026-11).
template <class Done>
ORTHONORM_AMX_INLINE void product_amx(const uint32_t* left, const uint32_t* right, int64_t rows,
                                      int64_t columns, int64_t K, float* sums, const Done& done) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      block_amx(left + i * K * amx_lanes, right + j * K * amx_lanes, K, sums);
      done(i, j, sums);
    }
  }
}

// Rows 2 p and 2 p + 1 of a block, in halves of 16 columns.
struct TwoRows {
  __m512 even[2], odd[2];

  ORTHONORM_AMX_INLINE void load(const float* sums, int64_t p) {
    ORTHONORM_UNROLL
    for (int h = 0; h < 2; ++h) {
      even[h] = _mm512_load_ps(sums + 64 * p + 16 * h);
      odd[h] = _mm512_load_ps(sums + 64 * p + 32 + 16 * h);
    }
  }
  // = scale them + q times what the block `right` holds there
  ORTHONORM_AMX_INLINE void add(float scale, float q, const uint32_t* right, int64_t p) {
    const __m512 vq = _mm512_set1_ps(q), vs = _mm512_set1_ps(scale);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    ORTHONORM_UNROLL
    for (int h = 0; h < 2; ++h) {
      const __m512i lanes = _mm512_load_si512(right + h * (amx_lanes / 2) + 16 * p);
      const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16));
      const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(lanes, high));
      even[h] = _mm512_fmadd_ps(vq, first, scale == 1 ? even[h] : _mm512_mul_ps(vs, even[h]));
      odd[h] = _mm512_fmadd_ps(vq, second, scale == 1 ? odd[h] : _mm512_mul_ps(vs, odd[h]));
    }
  }
  // Rounded, into a block of either layout.
  template <bool to_left>
  ORTHONORM_AMX_INLINE void store(uint32_t* left, uint32_t* right, int64_t p) const {
    const __m512i e = (__m512i)_mm512_cvtne2ps_pbh(even[1], even[0]);
    const __m512i o = (__m512i)_mm512_cvtne2ps_pbh(odd[1], odd[0]);
    if constexpr (to_left) {
      _mm512_store_si512(left + 32 * p, e);
      _mm512_store_si512(left + 32 * p + 16, o);
    }
    const Pairs joined = join_rows(e, o);
    _mm512_store_si512(right + 16 * p, joined.first);
    _mm512_store_si512(right + amx_lanes / 2 + 16 * p, joined.last);
  }
};

// A block in right layout as the left layout of its transpose. Quarters of four lines are joined
// by loads, which leaves half of the shuffles.
ORTHONORM_AMX_INLINE void turn_amx(const uint32_t* right, uint32_t* left) {
  for (int64_t column = 0; column < 32; column += 4) {
    const uint32_t* const from = right + column / 16 * (amx_lanes / 2) + column % 16;
    __m512i r[4];
    ORTHONORM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const auto quarter = [&](int line) __attribute__((always_inline)) {
        return (const __m128i*)(from + 16 * line);
      };
      r[i] = _mm512_castsi128_si512(_mm_load_si128(quarter(i)));
      r[i] = _mm512_inserti32x4(r[i], _mm_load_si128(quarter(i + 4)), 1);
      r[i] = _mm512_inserti32x4(r[i], _mm_load_si128(quarter(i + 8)), 2);
      r[i] = _mm512_inserti32x4(r[i], _mm_load_si128(quarter(i + 12)), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    uint32_t* const to = left + 16 * column;
    _mm512_store_si512(to, _mm512_unpacklo_epi64(a, c));
    _mm512_store_si512(to + 16, _mm512_unpackhi_epi64(a, c));
    _mm512_store_si512(to + 32, _mm512_unpacklo_epi64(b, d));
    _mm512_store_si512(to + 48, _mm512_unpackhi_epi64(b, d));
  }
}

// A = X^T X
struct GramAmx {
  const AmxBuffers& m;
  ORTHONORM_AMX_INLINE void operator()(int64_t i, int64_t j, const float* sums) const {
    uint32_t* const left = m.A_left + (i * m.across + j) * amx_lanes;
    uint32_t* const right = m.A_right + (j * m.across + i) * amx_lanes;
    for (int64_t p = 0; p < 16; ++p) {
      TwoRows rows;
      rows.load(sums, p);
      rows.store<true>(left, right, p);
    }
  }
};

// B = b A + c A^2
struct SquareAmx {
  const AmxBuffers& m;
  float b, c;
  ORTHONORM_AMX_INLINE void operator()(int64_t i, int64_t j, const float* sums) const {
    const int64_t at = (j * m.across + i) * amx_lanes;
    for (int64_t p = 0; p < 16; ++p) {
      TwoRows rows;
      rows.load(sums, p);
      rows.add(c, b, m.A_right + at, p);
      rows.store<false>(nullptr, m.B_right + at, p);
    }
  }
};

// X = a X + X B, as operands for the next iteration or, the last time, as float.
struct ApplyAmx {
  const AmxBuffers& m;
  float a;
  bool last;
  ORTHONORM_AMX_INLINE void operator()(int64_t i, int64_t j, const float* sums) const {
    const int64_t at = (j * m.down + i) * amx_lanes;
    if (last) {
      for (int64_t p = 0; p < 16; ++p) {
        TwoRows rows;
        rows.load(sums, p);
        rows.add(1, a, m.X_right + at, p);
        float* const to = m.X + (32 * i + 2 * p) * m.ld + 32 * j;
        _mm512_store_ps(to, rows.even[0]);
        _mm512_store_ps(to + 16, rows.even[1]);
        _mm512_store_ps(to + m.ld, rows.odd[0]);
        _mm512_store_ps(to + m.ld + 16, rows.odd[1]);
      }
      return;
    }
    uint32_t* const left = m.Y_left + (i * m.across + j) * amx_lanes;
    for (int64_t p = 0; p < 16; ++p) {
      TwoRows rows;
      rows.load(sums, p);
      rows.add(1, a, m.X_right + at, p);
      rows.store<true>(left, m.X_right + at, p);
    }
    turn_amx(m.X_right + at, m.Xt_left + at);
  }
};

// L x S floats at x, scaled, as operands.
ORTHONORM_AMX_INLINE void round_amx(const AmxBuffers& m, const float* x, int64_t ld,
                                    const FloatDivisor& d) {
  for (int64_t j = 0; j < m.across; ++j) {
    __mmask16 inside[2];
    for (int64_t h = 0; h < 2; ++h) {
      const int64_t left = m.S - 32 * j - 16 * h;
      inside[h] = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
    }
    for (int64_t i = 0; i < m.down; ++i) {
      const int64_t at = (j * m.down + i) * amx_lanes;
      for (int64_t p = 0; p < 16; ++p) {
        const int64_t row = 32 * i + 2 * p;
        TwoRows rows;
        ORTHONORM_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float* const from = x + row * ld + 32 * j + 16 * h;
          rows.even[h] = scaled_bf16(from, row < m.L ? inside[h] : 0, d);
          rows.odd[h] = scaled_bf16(from + ld, row + 1 < m.L ? inside[h] : 0, d);
        }
        rows.store<true>(m.X_left + (i * m.across + j) * amx_lanes, m.X_right + at, p);
      }
      turn_amx(m.X_right + at, m.Xt_left + at);
    }
  }
}

// X <- a X + X (b A + c A^2), A = X^T X, for each (a, b, c), of the matrix in operands;
// the result is in m.X.
ORTHONORM_AMX_INLINE void iterate_amx(AmxBuffers& m, const Polynomial& p) {
  const int64_t down = m.down, across = m.across;
  for (int64_t t = 0; t < p.steps; ++t) {
    const float a = static_cast<float>(p.coefficients[3 * t]);
    const float b = static_cast<float>(p.coefficients[3 * t + 1]);
    const float c = static_cast<float>(p.coefficients[3 * t + 2]);
    product_amx(m.Xt_left, m.X_right, across, across, down, m.sums, GramAmx{m});
    if (c != 0) {
      product_amx(m.A_left, m.A_right, across, across, across, m.sums, SquareAmx{m, b, c});
    } else {
      std::fill(m.sums, m.sums + amx_sums, 0.0f);
      for (int64_t i = 0; i < across; ++i) {
        for (int64_t j = 0; j < across; ++j) SquareAmx{m, b, 0}(i, j, m.sums);
      }
    }
    product_amx(m.X_left, m.B_right, down, across, across, m.sums,
                ApplyAmx{m, a, t + 1 == p.steps});
    std::swap(m.X_left, m.Y_left);
  }
}

#endif  // ORTHONORM_HAS_AMX

}  // namespace orthonorm::small
