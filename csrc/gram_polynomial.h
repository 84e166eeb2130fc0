// Q with Q X = p(X) for R = X X^T, by products of symmetric matrices that stay packed; torch-free.
#pragma once

#include "gemm_packed.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace orthonorm::gemm {

template <Isa I, class S>
class GramPolynomial {
  using F = Strips<I, S>;
  using P = Packed<I, S, S>;
  static constexpr int WIDTH = F::WIDTH, SIDE = F::SIDE;

 public:
  GramPolynomial(int64_t n, int64_t slots)
      : n_(n),
        panels_(F::panels(n)),
        size_(P::size(n, n)),
        memory_(4 * Workspace::bytes_for<S>(size_) + Workspace::bytes_for<S>(slots * SIDE * SIDE)) {
    for (S** matrix : {&R_, &Q_, &Z_, &W_}) *matrix = memory_.template take<S>(size_);
    sums_ = memory_.template take<S>(slots * SIDE * SIDE);
    for (S* matrix : {Q_, Z_, W_}) P::clear_edge(matrix, n, n);
  }

  //   Z = b R + c R^2;  Q <- a Q + Q Z, at first a I + Z;  W = a R + R Z;  R <- a W + W Z
  template <class T, class O>
  void run(Strided<const T> R, const std::vector<Triple>& triples, Strided<O> out,
           const Crew& crew) {
    plan_ = F::divide(n_, 0, n_, true, crew.threads);
    pack(R, crew);
    for (size_t t = 0; t < triples.size(); ++t) {
      const auto [a, b, c] = triples[t];
      const bool square = c != 0;
      if (square) multiply(R_, R_, c, b, Z_, crew);
      const S* Z = square ? Z_ : R_;
      const double z = square ? 1 : b;
      if (t == 0) {
        begin(Z, z, a, crew);
      } else {
        multiply(Q_, Z, z, a, W_, crew);
        std::swap(Q_, W_);
      }
      if (t + 1 == triples.size()) break;
      multiply(R_, Z, z, a, W_, crew);
      if (square) {
        multiply(W_, Z, z, a, R_, crew);
      } else {
        multiply(W_, Z, z, a, Z_, crew);
        std::swap(R_, Z_);
      }
    }
    unpack(out, crew);
  }

 private:
  template <class T>
  void pack(Strided<const T> R, const Crew& crew) {
    crew.each((panels_ + F::GROUP - 1) / F::GROUP, [&](int64_t, int64_t index) {
      F::pack_group(R, n_, index * F::GROUP, 0, n_, R_, n_);
    });
  }

  template <class O>
  void unpack(Strided<O> out, const Crew& crew) const {
    crew.each(panels_, [&](int64_t, int64_t panel) {
      const int64_t cols = std::min<int64_t>(WIDTH, n_ - panel * WIDTH);
      on<I>([&] {
        store<S, O, WIDTH>(Q_ + panel * WIDTH * n_, n_, cols,
                           {out.at(0, panel * WIDTH), out.row, out.col, 0});
      });
    });
  }

  // Q = z Z + a I.
  void begin(const S* Z, double z, double a, const Crew& crew) {
    const S factor = static_cast<S>(z);
    crew.each(panels_, [&](int64_t, int64_t panel) {
      const S* from = Z + panel * WIDTH * n_;
      S* to = Q_ + panel * WIDTH * n_;
      on<I>([&] {
        for (int64_t i = 0; i < n_ * WIDTH; ++i) to[i] = factor * from[i];
      });
      const int64_t first = panel * WIDTH;
      for (int64_t i = first; i < std::min(first + WIDTH, n_); ++i) {
        to[i * WIDTH + i - first] += static_cast<S>(a);
      }
    });
  }

  // D <- alpha L R + beta L, D being neither.
  void multiply(const S* L, const S* R, double alpha, double beta, S* D, const Crew& crew) {
    const S a = static_cast<S>(alpha), b = static_cast<S>(beta);
    crew.each(static_cast<int64_t>(plan_.size()), [&](int64_t slot, int64_t index) {
      F::multiply_block(
          plan_[index], L, R, n_, n_, true, sums_ + slot * SIDE * SIDE,
          [&](int64_t row, int64_t col, int64_t rows, int64_t cols, S* sums) {
            P::combine(sums, a, b, L, row, col, rows, n_);
            P::put_symmetric(sums, row, col, rows, cols, n_, {D, D});
          });
    });
  }

  const int64_t n_, panels_, size_;
  Workspace memory_;
  S *R_, *Q_, *Z_, *W_, *sums_;
  std::vector<Block> plan_;
};

// Where R has come near I, what is left beside its diagonal shrinks to its rounding with every
// iteration, relative to itself: ten of them reach subnormal numbers, with which Intel's processors
// took eight times as long (12 iterations on 8 matrices of 688 x 256, 606 ms for 62; 2026-11). They
// are added to multiples of I, unless an `a` is 0.
inline uint64_t chain_mode(const std::vector<Triple>& triples) {
  const bool keep = std::any_of(triples.begin(), triples.end(), [](auto t) { return t.a == 0; });
  return float_mode() | (keep ? 0 : FLUSH_TO_ZERO);
}

template <Isa I, class S, class T, class O>
void gram_polynomial_as(Strided<const T> R, const std::vector<Triple>& triples, Strided<O> out,
                        int64_t batch, int64_t n, int64_t threads, const Parallel& parallel) {
  using Engine = GramPolynomial<I, S>;
  const FloatMode mode(chain_mode(triples));
  const double work = static_cast<double>(n) * n * n * 3 * static_cast<double>(triples.size());
  for_batch(
      batch, work, threads, parallel,
      [&](int64_t slots) { return std::make_unique<Engine>(n, slots); },
      [&](Engine& engine, int64_t b, const Crew& crew) {
        engine.run(R.matrix(b), triples, out.matrix(b), crew);
      });
}

// `batch` matrices of n rows and columns, n > 0, at least one triple.
template <class T, class O>
void gram_polynomial(Strided<const T> R, const std::vector<Triple>& triples, Strided<O> out,
                     int64_t batch, int64_t n, int64_t threads, const Parallel& parallel,
                     Isa chosen) {
  using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
#if ORTHONORM_X86
  if (chosen >= Isa::avx512) {
    return gram_polynomial_as<Isa::avx512, S>(R, triples, out, batch, n, threads, parallel);
  }
  if (chosen == Isa::avx2) {
    return gram_polynomial_as<Isa::avx2, S>(R, triples, out, batch, n, threads, parallel);
  }
#endif
  gram_polynomial_as<Isa::portable, S>(R, triples, out, batch, n, threads, parallel);
}

}  // namespace orthonorm::gemm
