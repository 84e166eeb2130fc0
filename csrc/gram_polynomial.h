// Q with Q X = p(X) for R = X X^T, by products of symmetric matrices that stay packed; torch-free.
//
// A symmetric matrix is packed once and serves as either operand: rows of L and columns of R are the
// same panels. A strip of a symmetric result is a piece of a panel as it is, and its mirror image
// pieces of others, so nothing is packed again between the products.
#pragma once

#include "gemm_strips.h"

#include <memory>
#include <vector>

namespace orthonorm::gemm {

// One iteration: a I + b R + c R^2.
struct Triple {
  double a, b, c;
};

template <Isa I, class S>
class GramPolynomial {
  using F = Strips<I, S>;
  static constexpr int WIDTH = F::WIDTH, HEIGHT = F::HEIGHT, SIDE = F::SIDE;

 public:
  GramPolynomial(int64_t n, int64_t slots)
      : n_(n),
        panels_(F::panels(n)),
        size_(panels_ * WIDTH * n),
        memory_(4 * Workspace::bytes_for<S>(size_) + Workspace::bytes_for<S>(slots * SIDE * SIDE)) {
    for (S** matrix : {&R_, &Q_, &Z_, &W_}) *matrix = memory_.template take<S>(size_);
    sums_ = memory_.template take<S>(slots * SIDE * SIDE);
    for (S* matrix : {Q_, Z_, W_}) {  // beyond the matrix there are zeros, as in what is packed
      std::fill(matrix + (panels_ - 1) * WIDTH * n, matrix + size_, S(0));
    }
  }

  //   Z = b R + c R^2;  Q <- a Q + Q Z, at first a I + Z;  W = a R + R Z;  R <- a W + W Z
  template <class T>
  void run(Strided<const T> R, const std::vector<Triple>& triples, Strided<T> out,
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

  template <class T>
  void unpack(Strided<T> out, const Crew& crew) const {
    crew.each(panels_, [&](int64_t, int64_t panel) {
      const int64_t cols = std::min<int64_t>(WIDTH, n_ - panel * WIDTH);
      on<I>([&] {
        store<S, T, WIDTH>(Q_ + panel * WIDTH * n_, n_, cols,
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
    crew.each(static_cast<int64_t>(plan_.size()), [&](int64_t slot, int64_t index) {
      const Block& block = plan_[index];
      for (int64_t k = 0; k < n_; k += DEEP) {
        const int64_t chunk = std::min(DEEP, n_ - k);
        S* strip = sums_ + slot * SIDE * SIDE;
        for (int64_t col = block.col; col < block.col + block.cols; col += WIDTH) {
          const S* panel = R + (col * n_ + k * WIDTH);
          const int64_t cols = std::min<int64_t>(WIDTH, n_ - col), end = block.row + block.rows;
          for (int64_t row = std::max(block.row, col); row < end; row += HEIGHT) {
            const int64_t rows = std::min<int64_t>(HEIGHT, end - row);
            F::multiply_strip(L, n_, row, rows, cols, panel, k, chunk, k > 0, strip);
            if (k + chunk == n_) {
              on<I>([&] { finish(row, col, rows, cols, alpha, L, beta, strip, D); });
            }
            strip += HEIGHT * WIDTH;
          }
        }
      }
    });
  }

  // A strip is lanes [row, row + rows) of the panel of its columns; turned it is lanes of those
  // columns in the panels of its rows.
  ORTHONORM_INLINE void finish(int64_t row, int64_t col, int64_t rows, int64_t cols, double alpha,
                               const S* E, double beta, S* sums, S* D) const {
    const S a = static_cast<S>(alpha), b = static_cast<S>(beta);
    const S* extra = E + (col * n_ + row * WIDTH);
    for (int64_t i = 0; i < rows * WIDTH; ++i) sums[i] = a * sums[i] + b * extra[i];
    if (row == col) F::mirror(sums);
    std::memcpy(D + (col * n_ + row * WIDTH), sums, sizeof(S) * rows * WIDTH);
    alignas(64) S turned[WIDTH * HEIGHT];
    turn<S, HEIGHT, WIDTH, F::BYTES>(sums, turned);
    for (int64_t r = 0; r < rows;) {
      const int64_t within = (row + r) % WIDTH, count = std::min<int64_t>(WIDTH - within, rows - r);
      S* panel = D + ((row + r - within) * n_ + col * WIDTH + within);
      for (int64_t c = 0; c < cols; ++c) {
        std::memcpy(panel + c * WIDTH, turned + c * HEIGHT + r, sizeof(S) * count);
      }
      r += count;
    }
  }

  const int64_t n_, panels_, size_;
  Workspace memory_;
  S *R_, *Q_, *Z_, *W_, *sums_;
  std::vector<Block> plan_;
};

template <Isa I, class S, class T>
void gram_polynomial_as(Strided<const T> R, const std::vector<Triple>& triples, Strided<T> out,
                        int64_t batch, int64_t n, int64_t threads, const Parallel& parallel) {
  const double work = static_cast<double>(n) * n * n * 3 * static_cast<double>(triples.size());
  if (work * static_cast<double>(batch) < SERIAL_WORK) threads = 1;
  const auto at = [&](auto matrix, int64_t b) {
    matrix.data += b * matrix.batch;
    return matrix;
  };
  const Crew crew{threads, parallel}, alone{1, parallel};
  if (!whole(batch, threads, work)) {
    GramPolynomial<I, S> polynomial(n, threads);
    for (int64_t b = 0; b < batch; ++b) polynomial.run(at(R, b), triples, at(out, b), crew);
    return;
  }
  std::vector<std::unique_ptr<GramPolynomial<I, S>>> each(std::max<int64_t>(threads, 1));
  for (auto& polynomial : each) polynomial = std::make_unique<GramPolynomial<I, S>>(n, 1);
  crew.each(batch, [&](int64_t slot, int64_t b) {
    each[slot]->run(at(R, b), triples, at(out, b), alone);
  });
}

// `batch` matrices of n rows and columns, n > 0, at least one triple.
template <class T>
void gram_polynomial(Strided<const T> R, const std::vector<Triple>& triples, Strided<T> out,
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
