// A <- beta A + alpha X X^T: blocks on and below the diagonal, mirrored.
#include "../orthonorm.h"

#include "gemm_words.h"

namespace orthonorm {
namespace {

void gram_update_(const Tensor& A, const Tensor& X, double alpha, double beta) {
  check_matrix("gram_update_", "X", X);
  check_square("gram_update_", "A", A);
  check_like("gram_update_", "X", X, A, 1);
  const Tensor x = batched(X), a = batched(A);
  const MatrixView shape = view(x);
  with_element("gram_update_", shape.dtype, [&](auto element) {
    using T = decltype(element);
    gemm::Product<T> p;
    p.batch = shape.batch, p.rows = p.cols = shape.rows, p.depth = shape.cols;
    p.L = strided<const T>(x), p.E = strided<const T>(a), p.D = strided<T>(a);
    p.alpha = alpha, p.beta = beta;
    p.symmetric = p.gram = true;
    compute(p);
  });
  if (a.data_ptr() != A.data_ptr()) torch::stable::copy_(const_cast<Tensor&>(A), a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("gram_update_", TORCH_BOX(&gram_update_)); }

}  // namespace orthonorm
