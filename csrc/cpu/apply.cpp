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
    apply_into(strided<const T>(x), {shape.batch, shape.rows, shape.cols}, strided<const T>(left),
               a, b, strided<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("apply", TORCH_BOX(&apply)); }

}  // namespace orthonorm
