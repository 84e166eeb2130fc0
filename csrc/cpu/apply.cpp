// a X + b B X.
#include "../orthonorm.h"

#include "gemm_words.h"

namespace orthonorm {
namespace {

Tensor apply(Tensor X, Tensor B, double a, double b) {
  check_matrix("apply", "X", X);
  check_square("apply", "B", B);
  check_like("apply", "B", B, X, 1);
  const Tensor x = batched(X), left = batched(B);
  const MatrixView shape = view(x);
  Tensor out = fresh(x, shape.rows, shape.cols);
  with_element("apply", shape.dtype, [&](auto element) {
    using T = decltype(element);
    gemm::Product<T> p;
    p.batch = shape.batch, p.rows = p.depth = shape.rows, p.cols = shape.cols;
    p.L = strided<const T>(left), p.R = strided<const T>(x), p.D = strided<T>(out);
    if (a != 0) p.E = p.R;
    p.alpha = b, p.beta = a;
    compute(p);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("apply", TORCH_BOX(&apply)); }

}  // namespace orthonorm
