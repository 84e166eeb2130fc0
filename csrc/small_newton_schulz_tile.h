// Register tiles of small matrix products, written once over vectors of any width; torch-free.
//
// GNU vector types compile to whatever the enclosing function's target has, so these forced-inline
// functions serve SSE2, AVX2, AVX-512 and NEON alike. Vectors pass by reference only: by value they
// would change the ABI of a function compiled without their instruction set.
#pragma once

#include <cstdint>

#define ORTHONORM_INLINE [[gnu::always_inline]] inline
#define ORTHONORM_UNROLL _Pragma("GCC unroll 32")

namespace orthonorm::small {

// W elements of type E, aligned as the workspace is.
template <class E, int W>
struct Lanes {
  typedef E V __attribute__((vector_size(W * sizeof(E)), may_alias));
};

// How one instruction set multiplies: W lanes, register tiles of `tall` rows by two vectors or
// 2 `tall` rows by one. 8 x 2 fills AVX-512's registers to two thirds and reaches 95% of the
// arithmetic limit; 12 x 2, 8 x 3 and 6 x 4 were no faster (n = 32..128, 2026-11).
template <class E_, int W_, int tall_>
struct Machine {
  using E = E_;
  using V = typename Lanes<E_, W_>::V;
  static constexpr int W = W_;
  static constexpr int tall = tall_;
  static constexpr int grain = W_ < 4 ? W_ : 4;  // rows of the smallest tile
};

template <class V, class E>
ORTHONORM_INLINE V& at(E* p) {
  return *reinterpret_cast<V*>(p);
}
template <class V, class E>
ORTHONORM_INLINE const V& at(const E* p) {
  return *reinterpret_cast<const V*>(p);
}

// acc[i][w] = sum over k < K of a(i, k) b(k, w): rows of b are vectors, elements of a are spread.
// `k_major` reads a(i, k) = a[k lda + i], the transposed factor of a Gram product.
template <class M, int R, int N, bool k_major>
ORTHONORM_INLINE void tile(const typename M::E* a, int64_t lda, const typename M::E* b, int64_t ldb,
                           int64_t K, typename M::V (&acc)[R][N]) {
  using V = typename M::V;
  ORTHONORM_UNROLL
  for (int i = 0; i < R; ++i) {
    ORTHONORM_UNROLL
    for (int w = 0; w < N; ++w) acc[i][w] = V{};
  }
  for (int64_t k = 0; k < K; ++k) {
    V row[N];
    ORTHONORM_UNROLL
    for (int w = 0; w < N; ++w) row[w] = at<V>(b + k * ldb + w * M::W);
    ORTHONORM_UNROLL
    for (int i = 0; i < R; ++i) {
      const V spread = (k_major ? a[k * lda + i] : a[i * lda + k]) - V{};
      ORTHONORM_UNROLL
      for (int w = 0; w < N; ++w) acc[i][w] += spread * row[w];
    }
  }
}

// Tiles of R rows over rows [i, end), then one halving at a time down to the grain; returns where
// it stopped. `done(i, acc)` takes each finished tile. end - i is a multiple of the grain.
template <class M, int R, int N, bool k_major, class Done>
ORTHONORM_INLINE void band(const typename M::E* a, int64_t lda, const typename M::E* b, int64_t ldb,
                           int64_t K, int64_t i, int64_t end, const Done& done) {
  for (; i + R <= end; i += R) {
    typename M::V acc[R][N];
    tile<M, R, N, k_major>(a + (k_major ? i : i * lda), lda, b, ldb, K, acc);
    done(i, acc);
  }
  if constexpr (R > M::grain) {
    if (i < end) band<M, R / 2, N, k_major>(a, lda, b, ldb, K, i, end, done);
  }
}

// Interleaves the low and the high halves of two vectors: one step of a transposition.
template <class V, int... I>
ORTHONORM_INLINE void interleave(const V& a, const V& b, V& low, V& high) {
  constexpr int half = sizeof...(I) / 2, W = sizeof...(I);
  low = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * W)...);
  high = __builtin_shufflevector(a, b, (half + I / 2 + (I % 2) * W)...);
}
template <class V, int W>
ORTHONORM_INLINE void interleave_lanes(const V& a, const V& b, V& low, V& high) {
  if constexpr (W == 2) interleave<V, 0, 1>(a, b, low, high);
  if constexpr (W == 4) interleave<V, 0, 1, 2, 3>(a, b, low, high);
  if constexpr (W == 8) interleave<V, 0, 1, 2, 3, 4, 5, 6, 7>(a, b, low, high);
  if constexpr (W == 16) {
    interleave<V, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(a, b, low, high);
  }
}

// W vectors of W lanes as a matrix, transposed in place: log2(W) rotations of the index bits.
template <class V, int W>
ORTHONORM_INLINE void transpose(V (&rows)[W]) {
  ORTHONORM_UNROLL
  for (int step = 1; step < W; step *= 2) {
    V next[W];
    ORTHONORM_UNROLL
    for (int i = 0; i < W / 2; ++i) {
      interleave_lanes<V, W>(rows[i], rows[i + W / 2], next[2 * i], next[2 * i + 1]);
    }
    ORTHONORM_UNROLL
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

}  // namespace orthonorm::small
