// The polynomial in direct form: ../direct_polynomial.h, or word by word where that would take too
// much memory.
#include "../orthonorm.h"

#include "../direct_polynomial.h"
#include "gemm_words.h"

namespace orthonorm {
namespace {

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
    apply_into<T, T>(X, x, {left, A.row, A.col, 0}, a, c != 0 ? 1 : b, last);
    X = {last.data, last.row, last.col, 0};
  }
}

}  // namespace

template <class T, class O>
void direct_form(gemm::Strided<const T> X, const Sizes& x,
                 const std::vector<gemm::Triple>& triples, gemm::Strided<O> out) {
  if (x.rows * x.cols < PACKED || !std::is_same_v<T, O>) {
    return gemm::direct_polynomial<T, O>(X, triples, out, x.batch, x.rows, x.cols,
                                         torch::stable::get_num_threads(), torch_threads, isa());
  }
  if constexpr (std::is_same_v<T, O>) {
    for (int64_t b = 0; b < x.batch; ++b) {
      word_by_word<T>(X.matrix(b), {1, x.rows, x.cols}, triples, out.matrix(b));
    }
  }
}

template void direct_form(gemm::Strided<const float>, const Sizes&,
                          const std::vector<gemm::Triple>&, gemm::Strided<float>);
template void direct_form(gemm::Strided<const double>, const Sizes&,
                          const std::vector<gemm::Triple>&, gemm::Strided<double>);
template void direct_form(gemm::Strided<const Bf16>, const Sizes&,
                          const std::vector<gemm::Triple>&, gemm::Strided<Bf16>);
template void direct_form(gemm::Strided<const Bf16>, const Sizes&,
                          const std::vector<gemm::Triple>&, gemm::Strided<float>);
template void direct_form(gemm::Strided<const Fp16>, const Sizes&,
                          const std::vector<gemm::Triple>&, gemm::Strided<Fp16>);
template void direct_form(gemm::Strided<const Fp16>, const Sizes&,
                          const std::vector<gemm::Triple>&, gemm::Strided<float>);

namespace {

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
    direct_form<T, T>(from, sizes, triples, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("direct_polynomial", TORCH_BOX(&direct_polynomial));
}

}  // namespace orthonorm
