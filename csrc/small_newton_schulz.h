// X <- a X + (b A + c A^2) X, A = X X^T, of one matrix of at most 128 x 128 elements; torch-free.
//
// One core, one workspace: the matrix stays in its cache through all iterations. Wide matrices are
// transposed on the way in and out, so that the iteration works on the short side's Gram matrix.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cpu/isa.h"
#include "small_newton_schulz_amx.h"
#include "small_newton_schulz_bf16.h"
#include "small_newton_schulz_real.h"
#include "small_newton_schulz_row.h"
#include "small_newton_schulz_scale.h"

namespace orthonorm::small {

// Whether the iterates of a matrix stay in a core's cache. A single row or column has none.
inline bool fits(int64_t rows, int64_t cols) {
  return std::min(rows, cols) <= 1 || rows <= 128 * 128 / cols;
}

// What the products' operands are; bfloat16 needs Isa::avx512bf16, and in tiles Isa::amx.
enum class Arithmetic { float32, float64, bfloat16, bfloat16_tiles };

// Row-major values: `ld` elements from row to row. The matrix meant is the transpose if `flipped`.
template <class In>
struct Source {
  const In* data;
  int64_t rows, cols, ld;
  bool flipped = false;
};

// Elements of a buffer's row of n: whole cache lines, and never a multiple of eight of them, which
// would map a column of 128 rows to a few cache sets (4 x 2 tiles, n = 128: 161 against 213
// GFLOP/s, 2026-11).
template <class E>
constexpr int64_t leading(int64_t n) {
  constexpr int64_t line = 64 / sizeof(E);
  const int64_t lines = (n + line - 1) / line;
  return (lines % 8 == 0 ? lines + 1 : lines) * line;
}

// Cuts a workspace into buffers of whole cache lines; without memory it only counts.
class Cutter {
 public:
  explicit Cutter(std::byte* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    std::byte* const here = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(here);
  }
  int64_t used() const { return used_; }

 private:
  std::byte* memory_;
  int64_t used_ = 0;
};

template <class E>
Buffers<E> real_buffers(Cutter& cut, int64_t L, int64_t S) {
  const int64_t ld = leading<E>(S), rows = round_up(L, 4) * ld, square = round_up(S, 16) * ld;
  Buffers<E> m{L, S, ld, nullptr, nullptr, nullptr, nullptr};
  m.X = cut.take<E>(rows);
  m.Y = cut.take<E>(rows);
  m.A = cut.take<E>(square);
  m.B = cut.take<E>(square);
  return m;
}

#if ORTHONORM_X86
inline Bf16Buffers bf16_buffers(Cutter& cut, int64_t L, int64_t S) {
  const int64_t ld = leading<float>(S), ld_rows = leading<float>((S + 1) / 2);
  const int64_t rows = round_up(L, 4), square = round_up(S, 16);
  Bf16Buffers m{};
  m.L = L, m.S = S, m.ld = ld, m.ld_rows = ld_rows;
  m.X = cut.take<float>(rows * ld);
  m.X_rows = cut.take<uint32_t>(rows * ld_rows);
  m.Y_rows = cut.take<uint32_t>(rows * ld_rows);
  m.X_pairs = cut.take<uint32_t>(rows / 2 * ld);
  m.A_pairs = cut.take<uint32_t>(square / 2 * ld);
  m.B_pairs = cut.take<uint32_t>(square / 2 * ld);
  return m;
}
#endif

#if ORTHONORM_HAS_AMX
inline AmxBuffers amx_buffers(Cutter& cut, int64_t L, int64_t S) {
  AmxBuffers m{};
  m.L = L, m.S = S, m.down = (L + 31) / 32, m.across = (S + 31) / 32;
  m.ld = leading<float>(32 * m.across);
  const int64_t rows = m.down * m.across * amx_lanes, square = m.across * m.across * amx_lanes;
  m.X = cut.take<float>(32 * m.down * m.ld);
  m.sums = cut.take<float>(amx_sums);
  for (uint32_t** x : {&m.X_left, &m.Y_left, &m.X_right, &m.Xt_left}) {
    *x = cut.take<uint32_t>(rows);
  }
  for (uint32_t** x : {&m.A_left, &m.A_right, &m.B_right}) *x = cut.take<uint32_t>(square);
  return m;
}
#endif

// Bytes, aligned to 64, that `run` needs for one m x n matrix.
inline int64_t workspace_bytes(int64_t m, int64_t n, Arithmetic arithmetic) {
  Cutter cut(nullptr);
  cut.take<double>(m * n);
  if (std::min(m, n) == 1) return cut.used();
  if (arithmetic == Arithmetic::float64) real_buffers<double>(cut, std::max(m, n), std::min(m, n));
  if (arithmetic == Arithmetic::float32) real_buffers<float>(cut, std::max(m, n), std::min(m, n));
#if ORTHONORM_X86
  if (arithmetic == Arithmetic::bfloat16) bf16_buffers(cut, std::max(m, n), std::min(m, n));
#endif
#if ORTHONORM_HAS_AMX
  if (arithmetic == Arithmetic::bfloat16_tiles) {
    amx_buffers(cut, std::max(m, n), std::min(m, n));
    real_buffers<float>(cut, std::max(m, n), std::min(m, n));  // where there are no steps
  }
#endif
  return cut.used();
}

// body(Machine), compiled for `isa`. The body must be forced inline to inherit the target.
#if ORTHONORM_X86
template <class E, class Body>
ORTHONORM_AVX512 [[gnu::noinline]] void on_avx512(const Body& body) {
  body(Machine<E, 64 / sizeof(E), 8>{});
}
template <class E, class Body>
ORTHONORM_AVX2 [[gnu::noinline]] void on_avx2(const Body& body) {
  body(Machine<E, 32 / sizeof(E), 4>{});
}
#endif
template <class E, class Body>
void on(Isa isa, const Body& body) {
#if ORTHONORM_X86
  if (isa >= Isa::avx512) return on_avx512<E>(body);
  if (isa == Isa::avx2) return on_avx2<E>(body);
#endif
  static_cast<void>(isa);
  body(Machine<E, 16 / sizeof(E), 4>{});
}

#define ORTHONORM_BODY(machine) [&](auto machine) __attribute__((always_inline))

// Where a tall matrix lies, and what divides it.
template <class In>
struct Tall {
  const In* data;
  int64_t ld;
  Divisor divisor;
};

// x, transposed into `scratch` if it lies the other way, and measured.
template <class In>
Tall<In> measured(Isa isa, const Source<In>& x, const Scaling& scaling, const double* norm,
                  In* scratch, int64_t L, int64_t S) {
  Tall<In> tall{x.data, x.ld, {}};
  const bool turned = x.rows != L || (x.flipped && L == S);
  if (turned) tall.data = scratch, tall.ld = S;
  on<In>(isa, ORTHONORM_BODY(machine) {
    using M = decltype(machine);
    if (turned) transpose_copy<M>(x.data, x.ld, x.rows, x.cols, scratch, S);
    tall.divisor = measure<M>(tall.data, tall.ld, L, S, scaling, norm);
  });
  return tall;
}

// It brought into X (L x S), scaled.
template <class In, class E>
void prepare(Isa isa, const Tall<In>& x, int64_t L, int64_t S, E* X, int64_t ld) {
  on<E>(isa, ORTHONORM_BODY(machine) {
    scale<decltype(machine)>(x.data, x.ld, L, S, x.divisor, X, ld, round_up(L, 4),
                             round_up(S, 16));
  });
}

// The tall result to y, contiguous, as the caller's matrix lies.
template <class E>
void deliver(Isa isa, const E* X, int64_t ld, int64_t L, int64_t S, bool wide, E* y) {
  on<E>(isa, ORTHONORM_BODY(machine) {
    if (wide) {
      transpose_copy<decltype(machine)>(X, ld, L, S, y, L);
    } else {
      copy_rows<decltype(machine)>(X, ld, L, S, y);
    }
  });
}

// A row, contiguous in `scratch` unless it is so in memory that y does not share.
template <class In, class E>
void run_row(Isa isa, const Source<In>& x, const Scaling& scaling, const double* norm,
             const Polynomial& p, In* scratch, E* y) {
  const int64_t count = x.rows * x.cols;
  const In* from = x.data;
  if ((x.cols == 1 && x.ld != 1) || static_cast<const void*>(y) == from) {
    const int64_t step = x.cols == 1 ? x.ld : 1;
    for (int64_t i = 0; i < count; ++i) scratch[i] = from[i * step];
    from = scratch;
  }
  on<double>(isa, ORTHONORM_BODY(machine) {
    iterate_row<decltype(machine)>(from, count, scaling, norm, p, y);
  });
}

// Apart from `run`, so that the largest code is compiled once per E.
template <class E>
void iterate_on(Isa isa, Buffers<E>& m, const Polynomial& p) {
  on<E>(isa, ORTHONORM_BODY(machine) { iterate<decltype(machine)>(m, p); });
}
#if ORTHONORM_X86
struct OnPairs {
  ORTHONORM_AVX512BF16 [[gnu::noinline]] static void run(Bf16Buffers& m, const float* x,
                                                         int64_t ld, const FloatDivisor& d,
                                                         const Polynomial& p) {
    round_bf16(m, x, ld, d);
    iterate_bf16(m, p);
  }
};
#endif
#if ORTHONORM_HAS_AMX
struct OnTiles {
  ORTHONORM_AMX [[gnu::noinline]] static void run(AmxBuffers& m, const float* x, int64_t ld,
                                                  const FloatDivisor& d, const Polynomial& p) {
    const amx::Tiles tiles;
    round_amx(m, x, ld, d);
    iterate_amx(m, p);
  }
};
#endif

// The iteration on operands of bfloat16, rounded from x at once where that is float already.
template <class Products, class In, class M>
void run_rounded(Isa isa, const Tall<In>& x, M m, const Polynomial& p, bool wide, float* y) {
  if constexpr (sizeof(In) == 4) {
    Products::run(m, x.data, x.ld, FloatDivisor(x.divisor.by), p);
  } else {
    prepare(isa, x, m.L, m.S, m.X, m.ld);
    Products::run(m, m.X, m.ld, {}, p);
  }
  deliver(isa, m.X, m.ld, m.L, m.S, wide, y);
}

// y = the polynomial of x, scaled. E is double for Arithmetic::float64 and float otherwise; y is
// contiguous; `workspace` holds workspace_bytes; `norm` may be null.
template <class In, class E>
void run(Isa isa, Arithmetic arithmetic, const Source<In>& x, const Scaling& scaling,
         const double* norm, const Polynomial& p, std::byte* workspace, E* y) {
  const int64_t L = std::max(x.rows, x.cols), S = std::min(x.rows, x.cols);
  const bool wide = x.flipped ? x.cols < x.rows : x.rows < x.cols;
  Cutter cut(workspace);
  In* const scratch = reinterpret_cast<In*>(cut.take<double>(L * S));
  if (S == 1) return run_row(isa, x, scaling, norm, p, scratch, y);
  const Tall<In> tall = measured(isa, x, scaling, norm, scratch, L, S);
  if constexpr (sizeof(E) == 4) {
#if ORTHONORM_X86
    if (arithmetic == Arithmetic::bfloat16 && isa >= Isa::avx512bf16 && p.steps > 0) {
      return run_rounded<OnPairs>(isa, tall, bf16_buffers(cut, L, S), p, wide, y);
    }
#endif
#if ORTHONORM_HAS_AMX
    if (arithmetic == Arithmetic::bfloat16_tiles && p.steps > 0) {
      return run_rounded<OnTiles>(isa, tall, amx_buffers(cut, L, S), p, wide, y);
    }
#endif
  }
  static_cast<void>(arithmetic);
  Buffers<E> m = real_buffers<E>(cut, L, S);
  prepare(isa, tall, L, S, m.X, m.ld);
  iterate_on(isa, m, p);
  deliver(isa, m.X, m.ld, L, S, wide, y);
}

}  // namespace orthonorm::small
