// Power iteration on one matrix, cut into blocks that threads may share; torch-free.
#pragma once

#include <cstddef>
#include <limits>

#include "power_quotient.h"
#include "power_vectors.h"

namespace orthonorm::power {

struct Matrix {
  Source source;
  int64_t rows, cols;
  Rule rule;
  Target quotient{};  // W / sigma (W itself for sigma = 0), if it is wanted

  bool is_double() const { return source.element == Element::f64; }
  int64_t sweeps() const {
    const int64_t power = std::max<int64_t>(rule.steps + !rule.left_first, 1);
    return power + (quotient.data != nullptr);
  }
};

// Rows of a block, and how many blocks. Depends on the shape alone, and so do all sums.
//
// 256 KB of float32 each, but at least 32 rows: the sums of a block are as long as one row of it.
struct Cut {
  int64_t rows, blocks;

  Cut(int64_t all, int64_t cols) {
    const int64_t wanted = std::min((all * cols + 65535) / 65536, all / 32);
    blocks = std::max<int64_t>(wanted, 1);
    rows = ((all + blocks - 1) / blocks + GROUP - 1) / GROUP * GROUP;
    blocks = (all + rows - 1) / rows;
  }
};

enum class Side { left, right };

// One matrix on its way: sweep over all blocks in any order, `end_sweep`, and again until done.
//
// Io is the caller's memory: load<A>(matrix, side, to), store<A>(matrix, side, from) and
// sigma(matrix, value). A vector is stored only if a step replaced it.
class Iteration {
 public:
  Iteration() : cut_(1, 1) {}

  // `memory`: memory_for(matrix) bytes, aligned to 64, for as long as this is used.
  template <class Io>
  void begin(const Io& io, const Matrix& matrix, int64_t index, std::byte* memory, Isa chosen) {
    matrix_ = &matrix, index_ = index, isa_ = chosen;
    cut_ = Cut(matrix.rows, matrix.cols);
    source_ = matrix.source;
    progress_ = Progress(matrix.rule);
    sweep_ = progress_.next();
    typed([&]<class A>(A*) {
      place<A>(memory);
      read<A>(io);
    });
  }

  int64_t blocks() const { return cut_.blocks; }
  bool done() const { return sweep_ == Sweep::done; }

  // `memory`: scratch_for(matrix) bytes of the calling thread.
  void block(int64_t b, std::byte* memory) {
    const int64_t first = b * cut_.rows;
    const int64_t rows = std::min(cut_.rows, matrix_->rows - first), cols = matrix_->cols;
    typed([&]<class A>(A*) {
      A* const scratch = at<A>(memory);
      if (sweep_ == Sweep::peak) {
        peaks_[b] = peak_of_rows(source_, first, rows, cols, scratch);
        return;
      }
      if (sweep_ == Sweep::quotient) {
        const double sigma = static_cast<A>(progress_.sigma());  // as it is returned
        const double divisor = sigma == 0 ? 1 : sigma;
        return divide_rows(source_, matrix_->quotient, first, rows, cols, divisor);
      }
      A* const left = at<A>(sweep_ == Sweep::adjoint ? left_ : product_) + first;
      A* const sums = at<A>(sums_) + b * stride<A>(cols);
      const int64_t after = matrix_->rows - first - rows;
      sweep_block<A>(source_, first,
                     {sweep_, rows, cols, after, at<A>(right_), left, sums, scratch}, isa_);
    });
  }

  template <class Io>
  void end_sweep(const Io& io) {
    if (sweep_ == Sweep::quotient) {
      sweep_ = Sweep::done;
      return;
    }
    typed([&]<class A>(A*) {
      if (sweep_ == Sweep::peak) {
        rescale<A>(io);
      } else if (take<A>()) {
        sweep_ = progress_.next();
      } else if (!progress_.rescaled()) {
        sweep_ = Sweep::peak;
      } else {
        stop(std::numeric_limits<double>::quiet_NaN());
      }
      if (done()) write<A>(io);
    });
    if (done() && matrix_->quotient.data != nullptr) sweep_ = Sweep::quotient;
  }

  static int64_t memory_for(const Matrix& m) {
    const int64_t size = m.is_double() ? 8 : 4, blocks = Cut(m.rows, m.cols).blocks;
    const int64_t line = m.is_double() ? stride<double>(m.cols) : stride<float>(m.cols);
    return aligned(8 * blocks) + 2 * aligned(size * m.rows) + (blocks + 1) * size * line;
  }
  static int64_t scratch_for(const Matrix& m) {
    return aligned(m.is_double() ? 8 * power::scratch_for<double>(m.cols)
                                 : 4 * power::scratch_for<float>(m.cols));
  }

 private:
  static int64_t aligned(int64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

  template <class A>
  static int64_t stride(int64_t cols) {
    return aligned(cols * sizeof(A)) / sizeof(A);
  }

  template <class F>
  void typed(const F& f) {
    if (matrix_->is_double()) {
      f(static_cast<double*>(nullptr));
    } else {
      f(static_cast<float*>(nullptr));
    }
  }

  template <class A>
  static A* at(std::byte* memory) {
    return reinterpret_cast<A*>(memory);
  }

  template <class A>
  void place(std::byte* memory) {
    peaks_ = at<double>(memory);
    left_ = memory + aligned(8 * cut_.blocks);
    product_ = left_ + aligned(sizeof(A) * matrix_->rows);
    right_ = product_ + aligned(sizeof(A) * matrix_->rows);
    sums_ = right_ + sizeof(A) * stride<A>(matrix_->cols);
  }

  template <class A, class Io>
  void read(const Io& io) {
    io.load(index_, Side::left, at<A>(left_));
    io.load(index_, Side::right, at<A>(right_));
    std::fill(at<A>(right_) + matrix_->cols, at<A>(right_) + stride<A>(matrix_->cols), A(0));
  }

  template <class A, class Io>
  void write(const Io& io) {
    io.sigma(index_, progress_.sigma());
    if (progress_.left_new) {
      scale(at<A>(left_), progress_.left_factor, matrix_->rows, at<A>(product_));
      io.store(index_, Side::left, at<A>(product_));
    }
    if (progress_.right_new) io.store(index_, Side::right, at<A>(right_));
  }

  // The numbers of a finished sweep; false if they cannot be trusted.
  template <class A>
  bool take() {
    const int64_t rows = matrix_->rows, cols = matrix_->cols;
    const bool both = sweep_ == Sweep::both;
    if (sweep_ != Sweep::adjoint) {
      const double sum = square_sum(at<A>(product_), rows);
      if (!fits<A>(sum, 1)) return false;
      if (progress_.evaluates()) return evaluate<A>();
      if (progress_.product(sum)) {
        std::swap(left_, product_);
        // So that the adjoint does not square W's scale once more.
        if (progress_.rescaled()) progress_.left_factor *= bring_near_one(at<A>(left_), rows);
      }
    }
    if (sweep_ != Sweep::product) {
      A* const sums = at<A>(sums_);
      if (cut_.blocks > 1) add_blocks(sums, cut_.blocks, stride<A>(cols), cols, sums);
      const double sum = square_sum(sums, cols);
      if (!fits<A>(sum, both ? 2 : 1)) return false;
      if (progress_.adjoint(sum)) {
        scale(sums, progress_.right_factor, cols, at<A>(right_));
        progress_.right_factor = 1;
      }
    }
    return true;
  }

  template <class A>
  bool fits(double sum, int factors) const {
    return progress_.rescaled() ? std::isfinite(sum) : comfortable<A>(sum, factors);
  }

  template <class A>
  bool evaluate() {
    const double sigma = dot(at<A>(left_), at<A>(product_), matrix_->rows);
    progress_.evaluate(sigma);
    return std::isfinite(sigma);
  }

  // Starts again with the largest entry in [1, 2), or ends: 0 for zeros, NaN if not finite.
  template <class A, class Io>
  void rescale(const Io& io) {
    const double largest = *std::max_element(peaks_, peaks_ + cut_.blocks);
    if (largest == 0) return stop(0);
    if (!std::isfinite(largest)) return stop(std::numeric_limits<double>::quiet_NaN());
    source_.exponent = std::ilogb(largest);
    progress_.rescale(source_.exponent);
    read<A>(io);
    progress_.left_factor = bring_near_one(at<A>(left_), matrix_->rows);
    progress_.right_factor = bring_near_one(at<A>(right_), matrix_->cols);
    sweep_ = progress_.next();
  }

  void stop(double sigma) {
    progress_.stop(sigma);
    sweep_ = Sweep::done;
  }

  const Matrix* matrix_ = nullptr;
  int64_t index_ = 0;
  Isa isa_ = Isa::portable;
  Cut cut_;
  Source source_;
  Progress progress_;
  Sweep sweep_ = Sweep::done;
  double* peaks_ = nullptr;
  std::byte *left_ = nullptr, *product_ = nullptr, *right_ = nullptr, *sums_ = nullptr;
};

}  // namespace orthonorm::power
