// The polynomial in direct form: ../direct_polynomial.h, or word by word where that would take too
// much memory.
#include "../orthonorm.h"

#include "../direct_polynomial.h"
#include "gemm_words.h"

namespace orthonorm {
namespace {

// Elements of X from which on it is not held in three packed copies but taken slab by slab: at
// 8192 x 8192 the copies are 800 MB in float32, and repacking X is a hundredth of the products.
constexpr int64_t PACKED = int64_t{1} << 26;

// One matrix. A and B are rounded to T as the packed ones are; X is iterated in `out` and one copy.
template <class T>
void word_by_word(gemm::Strided<const T> X, const Sizes& x,
                  const std::vector<gemm::Triple>& triples, gemm::Strided<T> out) {
  using gemm::Workspace;
  const int64_t square = x.rows * x.rows, count = x.rows * x.cols;
  Workspace memory(2 * Workspace::bytes_for<T>(square) + Workspace::bytes_for<T>(count));
  const auto A = packed(memory.take<T>(square), x.rows, x.rows);
  const auto B = packed(memory.take<T>(square), x.rows, x.rows);
  gemm::Strided<T> next = packed(memory.take<T>(count), x.rows, x.cols), last = out;
  if (triples.size() % 2 == 1) std::swap(next, last);  // so that the last one is written to `out`
  for (const auto [a, b, c] : triples) {
    std::swap(next, last);
    gram_into(X, x, A);
    if (c != 0) {
      gemm::Product<T> p;
      p.rows = p.cols = p.depth = x.rows;
      p.L = p.R = p.E = {A.data, A.row, A.col, 0};
      p.D = B, p.alpha = c, p.beta = b;
      p.symmetric = p.gram = true;
      compute(p);
    }
    const T* left = c != 0 ? B.data : A.data;
    apply_into<T>(X, x, {left, A.row, A.col, 0}, a, c != 0 ? 1 : b, last);
    X = {last.data, last.row, last.col, 0};
  }
}

Tensor direct_polynomial(Tensor X, std::vector<double> coefficients) {
  check_matrix("direct_polynomial", "X", X);
  const std::vector<gemm::Triple> triples = triples_of("direct_polynomial", coefficients);
  const Tensor x = batched(X);
  const MatrixView shape = view(x);
  Tensor out = fresh(x, shape.rows, shape.cols);
  if (out.numel() == 0) return out;
  with_element("direct_polynomial", shape.dtype, [&](auto element) {
    using T = decltype(element);
    const auto [from, to, sizes] = short_side_first<T>(x, out);
    if (sizes.rows * sizes.cols < PACKED) {
      return gemm::direct_polynomial<T>(from, triples, to, sizes.batch, sizes.rows, sizes.cols,
                                        torch::stable::get_num_threads(), torch_threads, isa());
    }
    for (int64_t b = 0; b < sizes.batch; ++b) {
      word_by_word<T>(from.matrix(b), {1, sizes.rows, sizes.cols}, triples, to.matrix(b));
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("direct_polynomial", TORCH_BOX(&direct_polynomial));
}

}  // namespace orthonorm
