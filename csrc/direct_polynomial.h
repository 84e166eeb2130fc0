// X <- a X + (b A + c A^2) X with A = X X^T, X and A packed through all iterations; torch-free.
#pragma once

#include "gemm_packed.h"

#include <memory>
#include <vector>

namespace orthonorm::gemm {

template <Isa I, class T, class Lane>
class DirectPolynomial {
  using F = Strips<I, Lane>;
  using P = Packed<I, T, Lane>;
  using S = typename F::S;
  static constexpr int WIDTH = F::WIDTH, SIDE = F::SIDE;

 public:
  // For matrices of n rows and m columns on up to `slots` threads.
  DirectPolynomial(int64_t n, int64_t m, int64_t slots)
      : n_(n),
        m_(m),
        lanes_(lanes_of<Lane>(n)),
        memory_(P::bytes(n, m) + 2 * Workspace::bytes_for<Lane>(P::size(m, n)) +
                2 * P::bytes(n, n) + Workspace::bytes_for<S>(slots * SIDE * SIDE)) {
    rows_ = P::take(memory_, n, m);
    for (Lane** X : {&X_, &next_}) *X = memory_.template take<Lane>(P::size(m, n));
    for (auto* A : {&A_, &B_}) *A = P::take(memory_, n, n);
    sums_ = memory_.template take<S>(slots * SIDE * SIDE);
    P::clear_edge(next_, m, n);
    for (const auto& A : {A_, B_}) P::clear_edge(A.left, n, n);
  }

  template <class O>
  void run(Strided<const T> X, const std::vector<Triple>& triples, Strided<O> out,
           const Crew& crew) {
    if (square_.empty()) {
      square_ = F::divide(n_, 0, n_, true, crew.threads);
      whole_ = F::divide(n_, 0, m_, false, crew.threads);
    }
    pack(X, crew);
    for (size_t t = 0; t < triples.size(); ++t) {
      const auto [a, b, c] = triples[t];
      gram(crew);
      if (c != 0) update(static_cast<S>(b), static_cast<S>(c), crew);
      const bool last = t + 1 == triples.size();
      apply((c != 0 ? B_ : A_).left, static_cast<S>(c != 0 ? 1 : b), static_cast<S>(a),
            last ? &out : nullptr, crew);
    }
  }

 private:
  void pack(Strided<const T> X, const Crew& crew) {
    const auto groups = [](int64_t count) { return (F::panels(count) + F::GROUP - 1) / F::GROUP; };
    const int64_t left = groups(n_), deep = lanes_of<Lane>(m_);
    crew.each(left + groups(m_), [&](int64_t, int64_t index) {
      if (index < left) {
        F::pack_group(X, n_, index * F::GROUP, 0, m_, rows_.left, deep, true);
        if (rows_.left == rows_.right) return;
        F::pack_group(X, n_, index * F::GROUP, 0, m_, rows_.right, deep);
      } else {
        F::pack_group(X.transposed(), m_, (index - left) * F::GROUP, 0, n_, X_, lanes_);
      }
    });
  }

  template <class Done>
  void multiply(const std::vector<Block>& plan, const Lane* L, const Lane* R, int64_t depth,
                const Crew& crew, const Done& done) {
    const bool symmetric = &plan == &square_;
    crew.each(static_cast<int64_t>(plan.size()), [&](int64_t slot, int64_t index) {
      F::multiply_block(plan[index], L, R, lanes_of<Lane>(depth), symmetric ? n_ : m_, symmetric,
                        sums_ + slot * SIDE * SIDE, done);
    });
  }

  // A = X X^T.
  void gram(const Crew& crew) {
    multiply(square_, rows_.left, rows_.right, m_, crew,
             [&](int64_t row, int64_t col, int64_t rows, int64_t cols, S* sums) {
               P::put_symmetric(sums, row, col, rows, cols, lanes_, A_);
             });
  }

  // B = b A + c A^2.
  void update(S b, S c, const Crew& crew) {
    multiply(square_, A_.left, A_.right, n_, crew,
             [&](int64_t row, int64_t col, int64_t rows, int64_t cols, S* sums) {
               P::combine(sums, c, b, A_.right, row, col, rows, lanes_);
               P::put_symmetric(sums, row, col, rows, cols, lanes_, B_);
             });
  }

  // X <- a X + z B X, to memory in the end.
  template <class O>
  void apply(const Lane* B, S z, S a, const Strided<O>* out, const Crew& crew) {
    multiply(whole_, B, X_, n_, crew,
             [&](int64_t row, int64_t col, int64_t rows, int64_t cols, S* sums) {
               P::combine(sums, z, a, X_, row, col, rows, lanes_);
               if (out != nullptr) {
                 const Strided<O> to{out->at(row, col), out->row, out->col, 0};
                 return F::store_strip(sums, rows, cols, to);
               }
               P::put(sums, row, col, rows, cols, lanes_, next_);
               P::put_rows(sums, row, col, rows, cols, lanes_of<Lane>(m_), rows_);
             });
    std::swap(X_, next_);
  }

  const int64_t n_, m_, lanes_;
  Workspace memory_;
  Operand<Lane> rows_, A_, B_;  // X by rows
  Lane *X_, *next_;             // X by columns, and its next
  S* sums_;
  std::vector<Block> square_, whole_;  // blocks of A and of X
};

template <Isa I, class Lane, class T, class O>
void direct_polynomial_as(Strided<const T> X, const std::vector<Triple>& triples, Strided<O> out,
                          int64_t batch, int64_t n, int64_t m, int64_t threads,
                          const Parallel& parallel) {
  using Engine = DirectPolynomial<I, T, Lane>;
  const double work =
      static_cast<double>(n) * n * (3 * m + n) * static_cast<double>(triples.size());
  for_batch(
      batch, work, threads, parallel,
      [&](int64_t slots) { return std::make_unique<Engine>(n, m, slots); },
      [&](Engine& engine, int64_t b, const Crew& crew) {
        engine.run(X.matrix(b), triples, out.matrix(b), crew);
      });
}

// `batch` matrices of n rows and m columns, neither 0, at least one triple. `out` may be X: X is
// packed before anything is written.
template <class T, class O>
void direct_polynomial(Strided<const T> X, const std::vector<Triple>& triples, Strided<O> out,
                       int64_t batch, int64_t n, int64_t m, int64_t threads,
                       const Parallel& parallel, Isa chosen) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const auto as = [&]<Isa I, class Lane>() {
    direct_polynomial_as<I, Lane>(X, triples, out, batch, n, m, threads, parallel);
  };
#if ORTHONORM_X86
  if constexpr (std::is_same_v<T, Bf16>) {
#if ORTHONORM_HAS_AMX
    if (chosen == Isa::amx) return as.template operator()<Isa::amx, TilePair>();
#endif
    if (chosen == Isa::avx512bf16) return as.template operator()<Isa::avx512bf16, Pair>();
  }
  if (chosen >= Isa::avx512) return as.template operator()<Isa::avx512, Wide>();
  if (chosen == Isa::avx2) return as.template operator()<Isa::avx2, Wide>();
#endif
  as.template operator()<Isa::portable, Wide>();
}

}  // namespace orthonorm::gemm
