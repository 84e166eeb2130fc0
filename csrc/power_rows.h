// Sweeps over blocks of rows of a matrix; torch-free.
//
// Sums have 64 bytes of lanes on every instruction set and a fixed order, so a row's product and a
// column's sum do not depend on how rows are grouped, nor on whether they were copied first.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/isa.h"
#include "gemm_types.h"
#include "power_iteration.h"

#if defined(__GNUC__)
#define ORTHONORM_POWER_INLINE [[gnu::always_inline]] inline
// Into L2: eight rows and the sums are more than a first cache of 32 KB.
#define ORTHONORM_POWER_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#else
#error "power_rows.h needs GCC's vector extensions (GCC or Clang)"
#endif

namespace orthonorm::power {

enum class Element { f32, f64, bf16, f16 };

// Where the elements of one matrix are; strides in elements.
struct Source {
  const void* data = nullptr;
  Element element = Element::f32;
  int64_t row_stride = 0, col_stride = 1;
  int exponent = 0;  // elements are read as 2^-exponent times themselves
};

// A block of rows and the arrays of a sweep over it.
template <class A>
struct Block {
  Sweep sweep;
  int64_t rows, cols;
  int64_t after;   // rows of the matrix behind these
  const A* right;  // cols numbers, read by a product
  A* left;         // rows numbers, written by a product, read by an adjoint
  A* sums;         // width(cols) numbers, W^T left of this block
  A* scratch;      // scratch_for(cols) numbers
};

inline constexpr int64_t LINE = 64;  // bytes of lanes

// Rows read at a time. While a group is multiplied, the next one is prefetched, if W^T of the group
// follows; the more rows, the more streams keep memory busy and the fewer times the sums are
// touched. Narrower registers hold the sums of 4 rows.
inline constexpr int64_t GROUP = 8;

template <class A>
inline constexpr int64_t LANES = LINE / static_cast<int64_t>(sizeof(A));

// Terms of a row, or rows, added one after the other before they join a longer sum. Rounding errors
// of sums of one sign grow with the number of terms: with one sum of 5000 float32 terms, sigma of a
// 5000x3 matrix was off by 2e-6 instead of 2e-7 (2026-11).
inline constexpr int64_t CHUNK = 128;
static_assert(CHUNK % GROUP == 0);

// Columns of a copied row: at least all lanes, for rows shorter than that.
template <class A>
constexpr int64_t width(int64_t cols) {
  return std::max(cols, LANES<A>);
}

// Copied rows, and one row of sums.
template <class A>
constexpr int64_t scratch_for(int64_t cols) {
  return (GROUP + 1) * width<A>(cols);
}

template <class T, int BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <class T, int BYTES>
using Vector = typename VectorOf<T, BYTES>::type;

template <class V>
ORTHONORM_POWER_INLINE void load_bits(const void* from, V& to) {
  std::memcpy(&to, from, sizeof to);
}

template <class V>
ORTHONORM_POWER_INLINE void load(const float* from, V& to) {
  load_bits(from, to);
}
template <class V>
ORTHONORM_POWER_INLINE void load(const double* from, V& to) {
  load_bits(from, to);
}

// 16-bit elements in the low halves of words.
template <class V>
ORTHONORM_POWER_INLINE void load_words(const void* from, V& to) {
  Vector<uint16_t, sizeof(V) / 2> halves;
  load_bits(from, halves);
  to = __builtin_convertvector(halves, V);
}

template <class V>
ORTHONORM_POWER_INLINE void load(const Bf16* from, V& to) {
  Vector<uint32_t, sizeof(V)> words;
  load_words(from, words);
  words <<= 16;
  load_bits(&words, to);
}

// widen(Fp16), lane by lane.
template <class V>
ORTHONORM_POWER_INLINE void load(const Fp16* from, V& to) {
  Vector<uint32_t, sizeof(V)> words, bits;
  load_words(from, words);
  bits = (words & 0x7fff) << 13;
  load_bits(&bits, to);
  to *= 0x1p112f;
  const auto above = to >= 0x1p16f;
  load_bits(&to, bits);
  bits |= ((Vector<uint32_t, sizeof(V)>)above & 0x7f800000) | (words & 0x8000) << 16;
  load_bits(&bits, to);
}

// The last cols % LANES columns are read with the lanes before them, which `mask` clears.
template <class A>
using Mask = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

// 64 bytes of lanes; KEEP: those of `mask` only.
template <bool KEEP, class T, int BYTES, class A>
ORTHONORM_POWER_INLINE void load_line(const T* from, const Mask<A>* mask,
                                      Vector<A, BYTES> (&to)[LINE / BYTES]) {
  constexpr int W = BYTES / sizeof(A);
#pragma GCC unroll 4
  for (int k = 0; k < LINE / BYTES; ++k) {
    load(from + k * W, to[k]);
    if constexpr (KEEP) {
      Vector<Mask<A>, BYTES> bits, kept;
      load_bits(mask + k * W, kept);
      load_bits(&to[k], bits);
      bits &= kept;
      load_bits(&bits, to[k]);
    }
  }
}

// R rows `stride` apart; see Block.
template <class T, class A>
struct Rows {
  const T* first;
  int64_t stride, cols;
  const A* right;
  A* left;
  A* sums;
  const Mask<A>* mask;
  int64_t after;   // rows behind the last one, to be swept next
  const T* ahead;  // the group to prefetch
};

template <int R, class T, class A>
ORTHONORM_POWER_INLINE void fetch(const Rows<T, A>& p, int64_t j) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) ORTHONORM_POWER_PREFETCH(p.ahead + r * p.stride + j);
}

template <int R, bool KEEP, int BYTES, class T, class A>
ORTHONORM_POWER_INLINE void multiply(const Rows<T, A>& p, int64_t j,
                                     Vector<A, BYTES> (&sums)[R][LINE / BYTES]) {
  Vector<A, BYTES> right[LINE / BYTES], row[LINE / BYTES];
  load_line<false, A, BYTES, A>(p.right + j, nullptr, right);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    load_line<KEEP, T, BYTES, A>(p.first + r * p.stride + j, p.mask, row);
#pragma GCC unroll 4
    for (int k = 0; k < LINE / BYTES; ++k) sums[r][k] += row[k] * right[k];
  }
}

// Halves upon halves: the same sum for any register width.
template <class A, class V>
ORTHONORM_POWER_INLINE A sum_lanes(const V& v) {
  if constexpr (sizeof(V) == 2 * sizeof(A)) {
    return v[0] + v[1];
  } else {
    Vector<A, sizeof(V) / 2> low, high;
    load_bits(&v, low);
    load_bits(reinterpret_cast<const char*>(&v) + sizeof low, high);
    low += high;
    return sum_lanes<A>(low);
  }
}

// left[r] = row r . right.
template <int R, bool AHEAD, int BYTES, class T, class A>
ORTHONORM_POWER_INLINE void product_of(const Rows<T, A>& p) {
  constexpr int64_t L = LANES<A>;
  constexpr int K = LINE / BYTES;
  using V = Vector<A, BYTES>;
  V totals[R][K];
#pragma GCC unroll 16
  for (int i = 0; i < R * K; ++i) totals[i / K][i % K] = V{};
  for (int64_t j = 0; j < p.cols;) {
    V sums[R][K];
#pragma GCC unroll 16
    for (int i = 0; i < R * K; ++i) sums[i / K][i % K] = V{};
    const int64_t end = std::min(p.cols, j + CHUNK * L);
    for (; j + L <= end; j += L) {
      if constexpr (AHEAD) fetch<R>(p, j);
      multiply<R, false, BYTES>(p, j, sums);
    }
    if (j < end) multiply<R, true, BYTES>(p, p.cols - L, sums), j = end;
#pragma GCC unroll 16
    for (int i = 0; i < R * K; ++i) totals[i / K][i % K] += sums[i / K][i % K];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int k = K / 2; k > 0; k /= 2) {
#pragma GCC unroll 2
      for (int i = 0; i < k; ++i) totals[r][i] += totals[r][i + k];
    }
    p.left[r] = sum_lanes<A>(totals[r][0]);
  }
}

template <int R, bool KEEP, int BYTES, class T, class A>
ORTHONORM_POWER_INLINE void accumulate(const Rows<T, A>& p, int64_t j, const A (&left)[R]) {
  Vector<A, BYTES> sums[LINE / BYTES], row[LINE / BYTES];
  load_line<false, A, BYTES, A>(p.sums + j, nullptr, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    load_line<KEEP, T, BYTES, A>(p.first + r * p.stride + j, p.mask, row);
#pragma GCC unroll 4
    for (int k = 0; k < LINE / BYTES; ++k) sums[k] += row[k] * left[r];
  }
  std::memcpy(p.sums + j, sums, sizeof sums);
}

// sums += left[r] row r, row after row.
template <int R, int BYTES, class T, class A>
ORTHONORM_POWER_INLINE void adjoint_of(const Rows<T, A>& p) {
  constexpr int64_t L = LANES<A>;
  A left[R];
  for (int r = 0; r < R; ++r) left[r] = p.left[r];
  int64_t j = 0;
  for (; j + L <= p.cols; j += L) accumulate<R, false, BYTES>(p, j, left);
  if (j < p.cols) accumulate<R, true, BYTES>(p, p.cols - L, left);
}

template <int R, Sweep SWEEP, int BYTES, class T, class A>
ORTHONORM_POWER_INLINE void group(const Rows<T, A>& p) {
  if constexpr (SWEEP != Sweep::adjoint) product_of<R, SWEEP == Sweep::both, BYTES>(p);
  if constexpr (SWEEP != Sweep::product) adjoint_of<R, BYTES>(p);
}

// As many whole groups of R rows as there are from row `done` on; returns the first one left.
template <int R, Sweep SWEEP, int BYTES, class T, class A>
ORTHONORM_POWER_INLINE int64_t groups(const Rows<T, A>& all, int64_t rows, int64_t done) {
  Rows<T, A> p = all;
  for (; done + R <= rows; done += R) {
    p.first = all.first + done * p.stride;
    p.left = all.left + done;
    p.ahead = all.first + std::min(done + R, rows + p.after - R) * p.stride;
    group<R, SWEEP, BYTES>(p);
  }
  return done;
}

template <Sweep SWEEP, int BYTES, class T, class A>
ORTHONORM_POWER_INLINE void sweep_rows(const Rows<T, A>& p, int64_t rows) {
  int64_t done = 0;
  if constexpr (BYTES == LINE) done = groups<GROUP, SWEEP, BYTES>(p, rows, done);
  done = groups<4, SWEEP, BYTES>(p, rows, done);
  groups<1, SWEEP, BYTES>(p, rows, done);
}

template <int BYTES, class T, class A>
ORTHONORM_POWER_INLINE void sweep_rows(const Rows<T, A>& p, int64_t rows, Sweep sweep) {
  if (sweep == Sweep::both) {
    sweep_rows<Sweep::both, BYTES>(p, rows);
  } else if (sweep == Sweep::product) {
    sweep_rows<Sweep::product, BYTES>(p, rows);
  } else {
    sweep_rows<Sweep::adjoint, BYTES>(p, rows);
  }
}

// On the instruction set `chosen`, which the processor has.
template <class T, class A>
void sweep_rows(const Rows<T, A>& p, int64_t rows, Sweep sweep, Isa chosen) {
#if ORTHONORM_X86
  if (chosen >= Isa::avx512) return run_avx512([&] { sweep_rows<64>(p, rows, sweep); });
  if (chosen == Isa::avx2) return run_avx2([&] { sweep_rows<32>(p, rows, sweep); });
#endif
  sweep_rows<16>(p, rows, sweep);
}

// Calls f with a null pointer to the type of `element`.
template <class F>
void with_element(Element element, const F& f) {
  switch (element) {
    case Element::f32: return f(static_cast<const float*>(nullptr));
    case Element::f64: return f(static_cast<const double*>(nullptr));
    case Element::bf16: return f(static_cast<const Bf16*>(nullptr));
    case Element::f16: return f(static_cast<const Fp16*>(nullptr));
  }
}

// Rows [first, first + rows) as 2^-exponent times themselves, `width` apart, zeros behind each.
template <class T, class A>
void copy_rows_of(const Source& s, int64_t first, int64_t rows, int64_t cols, A* to) {
  const Shift<A> shift(s.exponent);
  const int64_t step = s.col_stride, out = width<A>(cols);
  specialized([&] {
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = static_cast<const T*>(s.data) + (first + i) * s.row_stride;
      A* row = to + i * out;
      if (step == 1) {
        for (int64_t j = 0; j < cols; ++j) row[j] = shift(static_cast<A>(widen(from[j])));
      } else {
        for (int64_t j = 0; j < cols; ++j) row[j] = shift(static_cast<A>(widen(from[j * step])));
      }
      for (int64_t j = cols; j < out; ++j) row[j] = 0;
    }
  });
}

template <class A>
void copy_rows(const Source& s, int64_t first, int64_t rows, int64_t cols, A* to) {
  with_element(s.element, [&]<class T>(const T*) {
    if constexpr (std::is_same_v<A, double> == std::is_same_v<T, double>) {
      copy_rows_of<T>(s, first, rows, cols, to);
    }
  });
}

// `rows` <= CHUNK rows from `first` on, `after` rows behind them; left is the first of these rows'.
template <class A>
void sweep_chunk(const Source& s, int64_t first, int64_t rows, int64_t after, A* left, A* sums,
                 const Block<A>& b, const Mask<A>* mask, Isa chosen) {
  if (s.col_stride == 1 && s.exponent == 0 && b.cols >= LANES<A>) {
    with_element(s.element, [&]<class T>(const T*) {
      if constexpr (std::is_same_v<A, double> == std::is_same_v<T, double>) {
        const T* row = static_cast<const T*>(s.data) + first * s.row_stride;
        const Rows<T, A> p{row, s.row_stride, b.cols, b.right, left, sums, mask, after, row};
        sweep_rows(p, rows, b.sweep, chosen);
      }
    });
    return;
  }
  const int64_t cols = width<A>(b.cols);
  for (int64_t i = 0; i < rows; i += GROUP) {
    const int64_t n = std::min(GROUP, rows - i);
    copy_rows(s, first + i, n, b.cols, b.scratch);
    const Rows<A, A> p{b.scratch, cols, cols, b.right, left + i, sums, mask, 0, b.scratch};
    sweep_rows(p, n, b.sweep, chosen);
  }
}

// The sweep over rows [first, first + b.rows) of `s`; b.left is the first of these rows'.
template <class A>
void sweep_block(const Source& s, int64_t first, const Block<A>& b, Isa chosen) {
  const int64_t cols = width<A>(b.cols);
  Mask<A> mask[LANES<A>];
  for (int64_t l = 0; l < LANES<A>; ++l) {
    mask[l] = l >= LANES<A> - b.cols % LANES<A> ? ~Mask<A>{0} : 0;
  }
  for (int64_t i = 0; i < b.rows; i += CHUNK) {
    A* const sums = i == 0 ? b.sums : b.scratch + GROUP * cols;
    if (b.sweep != Sweep::product) std::fill_n(sums, cols, A(0));
    const int64_t rows = std::min(CHUNK, b.rows - i), after = b.rows + b.after - i - rows;
    sweep_chunk(s, first + i, rows, after, b.left + i, sums, b, mask, chosen);
    if (b.sweep != Sweep::product && i > 0) {
      for (int64_t j = 0; j < cols; ++j) b.sums[j] += sums[j];
    }
  }
}

}  // namespace orthonorm::power
