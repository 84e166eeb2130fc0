// The polynomial of a Gram matrix: tensors as strided matrices of ../gram_polynomial.h.
#include "../orthonorm.h"

#include "../gram_polynomial.h"
#include "gemm_words.h"

namespace orthonorm {
namespace {

Tensor gram_polynomial(Tensor R, std::vector<double> coefficients) {
  check_square("gram_polynomial", "R", R);
  const std::vector<gemm::Triple> triples = triples_of("gram_polynomial", coefficients);
  const Tensor r = batched(R);
  const MatrixView shape = view(r);
  Tensor out = fresh(r, shape.rows, shape.rows);
  if (out.numel() == 0) return out;
  with_element("gram_polynomial", shape.dtype, [&](auto element) {
    using T = decltype(element);
    gemm::gram_polynomial<T, T>(strided<const T>(r), triples, strided<T>(out), shape.batch,
                                shape.rows, torch::stable::get_num_threads(), torch_threads, isa());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("gram_polynomial", TORCH_BOX(&gram_polynomial));
}

}  // namespace orthonorm
