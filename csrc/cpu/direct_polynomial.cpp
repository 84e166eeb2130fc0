// The polynomial in direct form: tensors as strided matrices of ../direct_polynomial.h.
#include "../orthonorm.h"

#include "../direct_polynomial.h"
#include "gemm_words.h"

namespace orthonorm {
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
    gemm::direct_polynomial<T>(strided<const T>(x), triples, strided<T>(out), shape.batch,
                               shape.rows, shape.cols, torch::stable::get_num_threads(),
                               torch_threads, isa());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("direct_polynomial", TORCH_BOX(&direct_polynomial));
}

}  // namespace orthonorm
