// Newton-Schulz on one small matrix in float or double arithmetic; torch-free.
//
// The matrix is tall (L x S, L >= S) and row-major, so both X^T X and X (a I + b A + c A^2) read
// their vectors along rows: no operand is ever packed or transposed. Of the symmetric products only
// blocks on and above the diagonal are computed, then mirrored.
#pragma once

#include "small_newton_schulz_tile.h"

namespace orthonorm::small {

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// a, b, c of every iteration.
struct Polynomial {
  const double* coefficients;
  int64_t steps;
};

// Where one matrix's iterates live: buffers of `ld` elements a row, columns beyond S zero.
template <class E>
struct Buffers {
  int64_t L, S, ld;
  E *X, *Y, *A, *B;
};

// The upper triangle of P^T P (P has K rows) by tiles, `done(i, j, acc)` for each; then mirrored.
template <class M, class Done>
ORTHONORM_INLINE void symmetric(const typename M::E* P, int64_t K, int64_t S, int64_t ld,
                                typename M::E* out, const Done& done) {
  constexpr int W = M::W, tall = M::tall;
  using V = typename M::V;
  const int64_t rows = round_up(S, M::grain), columns = round_up(S, W);
  for (int64_t j = 0; j < columns; j += 2 * W) {
    const bool single = j + W >= columns;
    const auto take = [&](int64_t i, auto& acc) __attribute__((always_inline)) { done(i, j, acc); };
    if (single) {
      band<M, 2 * tall, 1, true>(P, ld, P + j, ld, K, 0, rows, take);
      continue;
    }
    // The second half of the diagonal block needs its right half only.
    const auto right = [&](int64_t i, auto& acc) __attribute__((always_inline)) {
      done(i, j + W, acc);
    };
    const int64_t end = j + 2 * W < rows ? j + 2 * W : rows;
    band<M, tall, 2, true>(P, ld, P + j, ld, K, 0, j + W, take);
    band<M, 2 * tall, 1, true>(P, ld, P + j + W, ld, K, j + W, end, right);
  }
  for (int64_t j = W; j < columns; j += W) {
    for (int64_t i = 0; i < j; i += W) {
      V block[W];
      ORTHONORM_UNROLL
      for (int r = 0; r < W; ++r) block[r] = at<V>(out + (i + r) * ld + j);
      transpose<V, W>(block);
      ORTHONORM_UNROLL
      for (int r = 0; r < W; ++r) at<V>(out + (j + r) * ld + i) = block[r];
    }
  }
}

// A = X^T X
template <class M>
ORTHONORM_INLINE void gram(const Buffers<typename M::E>& m) {
  using V = typename M::V;
  symmetric<M>(m.X, m.L, m.S, m.ld, m.A,
               [&]<int R, int N>(int64_t i, int64_t j, V (&acc)[R][N])
                   __attribute__((always_inline)) {
                     ORTHONORM_UNROLL
                     for (int r = 0; r < R; ++r) {
                       ORTHONORM_UNROLL
                       for (int w = 0; w < N; ++w) {
                         at<V>(m.A + (i + r) * m.ld + j + w * M::W) = acc[r][w];
                       }
                     }
                   });
}

// B = b A + c A^2
template <class M>
ORTHONORM_INLINE void square(const Buffers<typename M::E>& m, typename M::E b, typename M::E c) {
  using V = typename M::V;
  symmetric<M>(m.A, m.S, m.S, m.ld, m.B,
               [&]<int R, int N>(int64_t i, int64_t j, V (&acc)[R][N])
                   __attribute__((always_inline)) {
                     ORTHONORM_UNROLL
                     for (int r = 0; r < R; ++r) {
                       ORTHONORM_UNROLL
                       for (int w = 0; w < N; ++w) {
                         const int64_t to = (i + r) * m.ld + j + w * M::W;
                         at<V>(m.B + to) = c * acc[r][w] + b * at<V>(m.A + to);
                       }
                     }
                   });
}

// B = b A
template <class M>
ORTHONORM_INLINE void multiple(const Buffers<typename M::E>& m, typename M::E b) {
  for (int64_t i = 0; i < m.S; ++i) {
    for (int64_t j = 0; j < m.S; j += M::W) {
      at<typename M::V>(m.B + i * m.ld + j) = b * at<typename M::V>(m.A + i * m.ld + j);
    }
  }
}

// Y = a X + X B
template <class M>
ORTHONORM_INLINE void apply(const Buffers<typename M::E>& m, typename M::E a) {
  using V = typename M::V;
  const int64_t rows = round_up(m.L, M::grain), columns = round_up(m.S, M::W);
  for (int64_t j = 0; j < columns; j += 2 * M::W) {
    const auto take = [&]<int R, int N>(int64_t i, V (&acc)[R][N]) __attribute__((always_inline)) {
      ORTHONORM_UNROLL
      for (int r = 0; r < R; ++r) {
        ORTHONORM_UNROLL
        for (int w = 0; w < N; ++w) {
          const int64_t to = (i + r) * m.ld + j + w * M::W;
          at<V>(m.Y + to) = acc[r][w] + a * at<V>(m.X + to);
        }
      }
    };
    if (j + M::W < columns) {
      band<M, M::tall, 2, false>(m.X, m.ld, m.B + j, m.ld, m.S, 0, rows, take);
    } else {
      band<M, 2 * M::tall, 1, false>(m.X, m.ld, m.B + j, m.ld, m.S, 0, rows, take);
    }
  }
}

// X <- a X + X (b A + c A^2), A = X^T X, for each (a, b, c); the result is in m.X.
template <class M>
ORTHONORM_INLINE void iterate(Buffers<typename M::E>& m, const Polynomial& p) {
  using E = typename M::E;
  for (int64_t t = 0; t < p.steps; ++t) {
    const E a = static_cast<E>(p.coefficients[3 * t]);
    const E b = static_cast<E>(p.coefficients[3 * t + 1]);
    const E c = static_cast<E>(p.coefficients[3 * t + 2]);
    gram<M>(m);
    if (c != E(0)) {
      square<M>(m, b, c);
    } else {
      multiple<M>(m, b);
    }
    apply<M>(m, a);
    E* const next = m.Y;
    m.Y = m.X;
    m.X = next;
  }
}

}  // namespace orthonorm::small
