// Packing: strided elements of any dtype into panels of lanes; torch-free.
//
// A panel holds `width` neighbours (rows of L or columns of R) for the whole depth, depth-major:
// lane (k, j) at panel[k width + j], zeros beyond the matrix. Strides end here, and so do dtypes.
// Panels of L for tiles are another layout: gemm_amx.h.
#pragma once

#include "gemm_types.h"

#include <algorithm>
#include <utility>

#if defined(__GNUC__)
#define ORTHONORM_INLINE [[gnu::always_inline]] inline
#else
#define ORTHONORM_INLINE inline
#endif

namespace orthonorm::gemm {

template <class Lane>
constexpr int64_t per_lane() {
  return paired<Lane> ? 2 : 1;
}

template <class Lane>
constexpr int64_t lanes_of(int64_t depth) {
  constexpr int64_t whole = on_tiles<Lane> ? TILE : 1, step = per_lane<Lane>() * whole;
  return (depth + step - 1) / step * whole;
}

template <class T, int BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <class T, int BYTES>
using Vector = typename VectorOf<T, BYTES>::type;

template <class V>
ORTHONORM_INLINE void load(const void* from, V& to) {
  std::memcpy(&to, from, sizeof to);
}
template <class V>
ORTHONORM_INLINE void save(void* to, const V& from) {
  std::memcpy(to, &from, sizeof from);
}

// lo, hi = the halves of a0 b0 a1 b1 ...
template <class V, size_t... I>
ORTHONORM_INLINE void interleave(const V& a, const V& b, V& lo, V& hi, std::index_sequence<I...>) {
  constexpr size_t n = sizeof...(I);
  lo = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * n)...);
  hi = __builtin_shufflevector(a, b, (n / 2 + I / 2 + (I % 2) * n)...);
}

// A W x W block of words transposed in registers: log2 W rounds of the perfect shuffle.
template <class V, size_t W>
ORTHONORM_INLINE void transpose(V (&r)[W]) {
  for (size_t round = 1; round < W; round *= 2) {
    V t[W];
#pragma GCC unroll 16
    for (size_t i = 0; i < W / 2; ++i) {
      interleave(r[i], r[i + W / 2], t[2 * i], t[2 * i + 1], std::make_index_sequence<W>());
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < W; ++i) r[i] = t[i];
  }
}

// The lane that begins with the element at `at`, of which `left` follow along the depth.
template <class T, class Lane>
ORTHONORM_INLINE Lane lane(const T* at, int64_t stride_k, int64_t left) {
  if (left <= 0) return Lane{};
  if constexpr (paired<Lane>) {
    return {at[0].bits | (left > 1 ? static_cast<uint32_t>(at[stride_k].bits) << 16 : 0u)};
  } else {
    return static_cast<Lane>(widen(at[0]));
  }
}

// W lanes along the depth from elements next to each other in memory.
template <class T, class Lane, int W>
ORTHONORM_INLINE void lanes_along_depth(const T* from, Lane* to) {
  if constexpr (paired<Lane> || std::is_same_v<Lane, T>) {
    std::memcpy(to, from, sizeof(Lane) * W);
  } else {
    for (int i = 0; i < W; ++i) to[i] = widen(from[i]);
  }
}

// The processor foresees lines, not rows: what is fetched is what a panel's next turn needs.
inline constexpr int64_t ROWS_AHEAD = 16;

// Elements next to each other across the panel: one row of lanes at a time.
template <class T, class Lane, int WIDTH>
ORTHONORM_INLINE void pack_across(
    const T* from, int64_t stride_k, int64_t count, int64_t depth, Lane* to) {
  constexpr int64_t step = per_lane<Lane>();
  const int64_t whole = count == WIDTH ? depth / step : 0;
  for (int64_t k = 0; k < whole; ++k) {
    const T* row = from + k * step * stride_k;
    for (int64_t i = 0; i < step; ++i) __builtin_prefetch(row + (ROWS_AHEAD * step + i) * stride_k);
    for (int j = 0; j < WIDTH; ++j) to[k * WIDTH + j] = lane<T, Lane>(row + j, stride_k, step);
  }
  for (int64_t k = whole; k < lanes_of<Lane>(depth); ++k) {
    const T* row = from + k * step * stride_k;
    for (int64_t j = 0; j < count; ++j) {
      to[k * WIDTH + j] = lane<T, Lane>(row + j, stride_k, depth - k * step);
    }
    for (int64_t j = count; j < WIDTH; ++j) to[k * WIDTH + j] = Lane{};
  }
}

// Elements next to each other along the depth: W x W blocks of lanes transposed in registers.
template <class T, class Lane, int WIDTH, int BYTES>
ORTHONORM_INLINE void pack_along(
    const T* from, int64_t stride_j, int64_t count, int64_t depth, Lane* to) {
  using Word = std::conditional_t<sizeof(Lane) == 8, uint64_t, uint32_t>;
  constexpr int W = BYTES / sizeof(Lane);
  constexpr int64_t step = per_lane<Lane>();
  const int64_t whole = depth / (step * W) * W;
  for (int j = 0; j < WIDTH; j += W) {
    const T* rows = from + j * stride_j;
    const int64_t valid = std::clamp<int64_t>(count - j, 0, W);
    for (int64_t k = 0; k < whole; k += W) {
      Vector<Word, BYTES> r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        Lane line[W] = {};
        if (i < valid) lanes_along_depth<T, Lane, W>(rows + i * stride_j + k * step, line);
        load(line, r[i]);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) save(to + (k + i) * WIDTH + j, r[i]);
    }
    for (int64_t k = whole; k < lanes_of<Lane>(depth); ++k) {
      for (int i = 0; i < W; ++i) {
        const int64_t left = i < valid ? depth - k * step : 0;
        to[k * WIDTH + j + i] = lane<T, Lane>(rows + i * stride_j + k * step, 1, left);
      }
    }
  }
}

// `count` <= WIDTH neighbours, `stride_j` apart, over `depth` elements `stride_k` apart.
template <class T, class Lane, int WIDTH, int BYTES>
ORTHONORM_INLINE void pack_panel(const T* from, int64_t stride_j, int64_t stride_k, int64_t count,
                                 int64_t depth, Lane* to) {
  if (stride_j == 1) return pack_across<T, Lane, WIDTH>(from, stride_k, count, depth, to);
  if (stride_k == 1) return pack_along<T, Lane, WIDTH, BYTES>(from, stride_j, count, depth, to);
  for (int64_t k = 0; k < lanes_of<Lane>(depth); ++k) {
    const T* row = from + k * per_lane<Lane>() * stride_k;
    for (int64_t j = 0; j < WIDTH; ++j) {
      const int64_t left = j < count ? depth - k * per_lane<Lane>() : 0;
      to[k * WIDTH + j] = lane<T, Lane>(row + j * stride_j, stride_k, left);
    }
  }
}

}  // namespace orthonorm::gemm
