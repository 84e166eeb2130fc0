// Newton-Schulz on one small matrix with bfloat16 products (AVX512-BF16); torch-free.
//
// The scheme of small_newton_schulz_real.h with X, A and B rounded to bfloat16 and sums in float.
// Every term of the polynomial takes the same rounded X and A: with a float copy of X in a X and of
// A in b A the errors no longer cancel (1.7e-2 instead of 1.2e-2, n = 128, 2026-11).
//
// vdpbf16ps sums over two neighbours in k, so operands are lanes of 32 bits, in one of two layouts:
//   pairs  lane (k / 2, j) holds rows k and k + 1 of column j: both factors of X^T X and A A
//   rows   lane (i, k / 2) holds columns k and k + 1 of row i, as memory has them: the left
//          factor of X B
#pragma once

#include "bf16_pairs.h"
#include "small_newton_schulz_real.h"

#if ORTHONORM_X86

#include <cmath>

#include <immintrin.h>

namespace orthonorm::small {

#define ORTHONORM_BF16_INLINE ORTHONORM_AVX512BF16 [[gnu::always_inline]] inline

// Columns beyond S are zero, and so is row L of X where L is odd.
struct Bf16Buffers {
  int64_t L, S, ld, ld_rows;
  float* X;  // the result; at first room for a matrix to be scaled in
  uint32_t *X_pairs, *A_pairs, *B_pairs;
  uint32_t *X_rows, *Y_rows;  // take turns
};

template <int R, int N, bool k_major>
ORTHONORM_BF16_INLINE void tile_bf16(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                                     int64_t K, __m512 (&acc)[R][N]) {
  ORTHONORM_UNROLL
  for (int i = 0; i < R; ++i) {
    ORTHONORM_UNROLL
    for (int w = 0; w < N; ++w) acc[i][w] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < K; ++k) {
    __m512i row[N];
    ORTHONORM_UNROLL
    for (int w = 0; w < N; ++w) row[w] = _mm512_load_si512(b + k * ldb + 16 * w);
    ORTHONORM_UNROLL
    for (int i = 0; i < R; ++i) {
      const __m512i spread = _mm512_set1_epi32(
          static_cast<int>(k_major ? a[k * lda + i] : a[i * lda + k]));
      ORTHONORM_UNROLL
      for (int w = 0; w < N; ++w) {
        acc[i][w] = _mm512_dpbf16_ps(acc[i][w], (__m512bh)spread, (__m512bh)row[w]);
      }
    }
  }
}

template <int R, int N, bool k_major, class Done>
ORTHONORM_BF16_INLINE void band_bf16(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                                     int64_t K, int64_t i, int64_t end, int64_t j,
                                     const Done& done) {
  for (; i + R <= end; i += R) {
    __m512 acc[R][N];
    tile_bf16<R, N, k_major>(a + (k_major ? i : i * lda), lda, b + j, ldb, K, acc);
    done(i, j, acc);
  }
  if constexpr (R > 4) {
    if (i < end) band_bf16<R / 2, N, k_major>(a, lda, b, ldb, K, i, end, j, done);
  }
}

// Two rows of one or two vectors, rounded and stored as pairs; `rows`, where given, takes them as
// rows too (`ld_rows` lanes apart).
template <int N>
ORTHONORM_BF16_INLINE void store_pairs(const __m512 (&even)[N], const __m512 (&odd)[N],
                                       uint32_t* pairs, uint32_t* rows, int64_t ld_rows) {
  __m512i e, o;
  if constexpr (N == 2) {
    e = (__m512i)_mm512_cvtne2ps_pbh(even[1], even[0]);
    o = (__m512i)_mm512_cvtne2ps_pbh(odd[1], odd[0]);
  } else {
    e = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(even[0]));
    o = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(odd[0]));
  }
  const Pairs joined = join_rows(e, o);
  _mm512_store_si512(pairs, joined.first);
  if constexpr (N == 2) _mm512_store_si512(pairs + 16, joined.last);
  if (rows != nullptr) {  // these are 32 columns, or 16 and padding
    _mm512_store_si512(rows, e);
    _mm512_store_si512(rows + ld_rows, o);
  }
}

// Block (i, j) of 16 x 16 of a symmetric matrix in pairs, copied to (j, i).
ORTHONORM_BF16_INLINE void mirror_pairs(uint32_t* pairs, int64_t ld, int64_t i, int64_t j) {
  using V = Lanes<uint32_t, 16>::V;
  alignas(64) static constexpr uint16_t part[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                    22, 24, 26, 28, 30, 1,  3,  5,  7,  9,  11,
                                                    13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i parted = _mm512_load_si512(part);
  V rows[8], next[8];
  ORTHONORM_UNROLL
  for (int r = 0; r < 8; ++r) {
    const __m512i lanes = _mm512_load_si512(pairs + (i / 2 + r) * ld + j);
    rows[r] = (V)_mm512_permutexvar_epi16(parted, lanes);
  }
  // Address bits (register 3, lane 4) rotate left by four: columns become the rows.
  ORTHONORM_UNROLL
  for (int step = 0; step < 4; ++step) {
    ORTHONORM_UNROLL
    for (int r = 0; r < 4; ++r) {
      interleave_lanes<V, 16>(rows[r], rows[r + 4], next[2 * r], next[2 * r + 1]);
    }
    ORTHONORM_UNROLL
    for (int r = 0; r < 8; ++r) rows[r] = next[r];
  }
  ORTHONORM_UNROLL
  for (int r = 0; r < 8; ++r) at<V>(pairs + (j / 2 + r) * ld + i) = rows[r];
}

// The upper triangle of P^T P (P has K pairs of rows) by tiles, then mirrored.
template <class Done>
ORTHONORM_BF16_INLINE void symmetric_bf16(const uint32_t* P, int64_t K, int64_t S, int64_t ld,
                                          uint32_t* out, const Done& done) {
  const int64_t rows = round_up(S, 4), columns = round_up(S, 16);
  for (int64_t j = 0; j < columns; j += 32) {
    if (j + 16 >= columns) {
      band_bf16<16, 1, true>(P, ld, P, ld, K, 0, rows, j, done);
      continue;
    }
    band_bf16<8, 2, true>(P, ld, P, ld, K, 0, j + 16, j, done);
    band_bf16<16, 1, true>(P, ld, P, ld, K, j + 16, j + 32 < rows ? j + 32 : rows, j + 16, done);
  }
  for (int64_t j = 16; j < columns; j += 16) {
    for (int64_t i = 0; i < j; i += 16) mirror_pairs(out, ld, i, j);
  }
}

// acc += q times the two rows that `pairs` holds.
template <int N>
ORTHONORM_BF16_INLINE void add_pairs(float q, const uint32_t* pairs, __m512 (&even)[N],
                                     __m512 (&odd)[N]) {
  const __m512 vq = _mm512_set1_ps(q);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  ORTHONORM_UNROLL
  for (int w = 0; w < N; ++w) {
    const __m512i lanes = _mm512_load_si512(pairs + 16 * w);
    even[w] = _mm512_fmadd_ps(vq, (__m512)((Lanes<uint32_t, 16>::V)lanes << 16), even[w]);
    odd[w] = _mm512_fmadd_ps(vq, _mm512_castsi512_ps(_mm512_and_si512(lanes, high)), odd[w]);
  }
}

// A = X^T X
struct GramBf16 {
  const Bf16Buffers& m;
  template <int R, int N>
  ORTHONORM_BF16_INLINE void operator()(int64_t i, int64_t j, __m512 (&acc)[R][N]) const {
    ORTHONORM_UNROLL
    for (int r = 0; r < R; r += 2) {
      store_pairs<N>(acc[r], acc[r + 1], m.A_pairs + (i + r) / 2 * m.ld + j, nullptr, 0);
    }
  }
};

// B = b A + c A^2
struct SquareBf16 {
  const Bf16Buffers& m;
  float b, c;
  template <int R, int N>
  ORTHONORM_BF16_INLINE void operator()(int64_t i, int64_t j, __m512 (&acc)[R][N]) const {
    ORTHONORM_UNROLL
    for (int r = 0; r < R; r += 2) {
      const int64_t to = (i + r) / 2 * m.ld + j;
      ORTHONORM_UNROLL
      for (int w = 0; w < N; ++w) acc[r][w] *= c, acc[r + 1][w] *= c;
      add_pairs<N>(b, m.A_pairs + to, acc[r], acc[r + 1]);
      store_pairs<N>(acc[r], acc[r + 1], m.B_pairs + to, nullptr, 0);
    }
  }
};

// B = b A
ORTHONORM_BF16_INLINE void multiple_bf16(const Bf16Buffers& m, float b) {
  for (int64_t i = 0; i < m.S; i += 2) {
    for (int64_t j = 0; j < m.S; j += 16) {
      __m512 even[1] = {_mm512_setzero_ps()}, odd[1] = {_mm512_setzero_ps()};
      add_pairs<1>(b, m.A_pairs + i / 2 * m.ld + j, even, odd);
      store_pairs<1>(even, odd, m.B_pairs + i / 2 * m.ld + j, nullptr, 0);
    }
  }
}

// X = a X + X B, as operands for the next iteration or, the last time, as float.
struct ApplyBf16 {
  const Bf16Buffers& m;
  float a;
  bool last;
  template <int R, int N>
  ORTHONORM_BF16_INLINE void operator()(int64_t i, int64_t j, __m512 (&acc)[R][N]) const {
    ORTHONORM_UNROLL
    for (int r = 0; r < R; r += 2) {
      uint32_t* const pairs = m.X_pairs + (i + r) / 2 * m.ld + j;
      add_pairs<N>(a, pairs, acc[r], acc[r + 1]);
      if (!last) {
        store_pairs<N>(acc[r], acc[r + 1], pairs, m.Y_rows + (i + r) * m.ld_rows + j / 2,
                       m.ld_rows);
        continue;
      }
      ORTHONORM_UNROLL
      for (int w = 0; w < N; ++w) {
        _mm512_store_ps(m.X + (i + r) * m.ld + j + 16 * w, acc[r][w]);
        _mm512_store_ps(m.X + (i + r + 1) * m.ld + j + 16 * w, acc[r + 1][w]);
      }
    }
  }
};

ORTHONORM_BF16_INLINE void apply_bf16(const Bf16Buffers& m, const ApplyBf16& done) {
  const int64_t rows = round_up(m.L, 4), columns = round_up(m.S, 16), K = (m.S + 1) / 2;
  for (int64_t j = 0; j < columns; j += 32) {
    if (j + 16 < columns) {
      band_bf16<8, 2, false>(m.X_rows, m.ld_rows, m.B_pairs, m.ld, K, 0, rows, j, done);
    } else {
      band_bf16<16, 1, false>(m.X_rows, m.ld_rows, m.B_pairs, m.ld, K, 0, rows, j, done);
    }
  }
}

// x / divisor of floats as (x first) second, first a power of two and x first between x and the
// quotient: no order of magnitude overflows, and a power of two in x and in its norm cancels.
struct FloatDivisor {
  float first = 1, second = 1;

  FloatDivisor() = default;
  explicit FloatDivisor(double by) {
    int e = 0;
    if (by > 0 && !std::isinf(by)) by = std::frexp(by, &e);
    first = std::ldexp(1.0f, -(e / 2));
    second = by == 0 ? 0.0f : std::ldexp(static_cast<float>(1 / by), e / 2 - e);
  }
};

// 16 values from x on, scaled; zero where `inside` is.
ORTHONORM_BF16_INLINE __m512 scaled_bf16(const float* x, __mmask16 inside, const FloatDivisor& d) {
  const __m512 near = _mm512_mul_ps(_mm512_maskz_loadu_ps(inside, x), _mm512_set1_ps(d.first));
  return _mm512_mul_ps(near, _mm512_set1_ps(d.second));
}

// L x S floats at x, scaled, as operands. What is scaled in float is rounded to bfloat16 at once:
// through double and a float copy it took a sixth of a 32 x 32 polynomial (2026-11).
ORTHONORM_BF16_INLINE void round_bf16(const Bf16Buffers& m, const float* x, int64_t ld,
                                      const FloatDivisor& d) {
  const int64_t rows = round_up(m.L, 4), columns = round_up(m.S, 16);
  for (int64_t j = 0; j < columns; j += 16) {
    const auto inside = static_cast<__mmask16>(m.S - j >= 16 ? 0xffff : (1 << (m.S - j)) - 1);
    for (int64_t i = 0; i < rows; i += 2) {
      const float* const from = x + i * ld + j;
      const __mmask16 first = i < m.L ? inside : 0, second = i + 1 < m.L ? inside : 0;
      const __m512 even[1] = {scaled_bf16(from, first, d)};
      const __m512 odd[1] = {scaled_bf16(from + ld, second, d)};
      uint32_t* const to = m.X_rows + i * m.ld_rows + j / 2;
      store_pairs<1>(even, odd, m.X_pairs + i / 2 * m.ld + j, nullptr, 0);
      _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(even[0]));
      _mm256_storeu_si256((__m256i*)(to + m.ld_rows), (__m256i)_mm512_cvtneps_pbh(odd[0]));
    }
  }
}

// X <- a X + X (b A + c A^2), A = X^T X, for each (a, b, c), of the matrix in operands;
// the result is in m.X.
ORTHONORM_BF16_INLINE void iterate_bf16(Bf16Buffers& m, const Polynomial& p) {
  for (int64_t t = 0; t < p.steps; ++t) {
    const float a = static_cast<float>(p.coefficients[3 * t]);
    const float b = static_cast<float>(p.coefficients[3 * t + 1]);
    const float c = static_cast<float>(p.coefficients[3 * t + 2]);
    const int64_t K = (m.S + 1) / 2;
    symmetric_bf16(m.X_pairs, (m.L + 1) / 2, m.S, m.ld, m.A_pairs, GramBf16{m});
    if (c != 0) {
      symmetric_bf16(m.A_pairs, K, m.S, m.ld, m.B_pairs, SquareBf16{m, b, c});
    } else {
      multiple_bf16(m, b);
    }
    apply_bf16(m, ApplyBf16{m, a, t + 1 == p.steps});
    uint32_t* const next = m.Y_rows;
    m.Y_rows = m.X_rows;
    m.X_rows = next;
  }
}

}  // namespace orthonorm::small

#endif  // ORTHONORM_X86
