// beta C + alpha A B for a symmetric result: blocks on and below the diagonal, mirrored.
#include "../orthonorm.h"

#include "gemm_words.h"

namespace orthonorm {
namespace {

Tensor symmetric_update(Tensor C, Tensor A, Tensor B, double alpha, double beta) {
  check_square("symmetric_update", "C", C);
  check_like("symmetric_update", "A", A, C, 0);
  check_like("symmetric_update", "B", B, C, 0);
  const Tensor c = batched(C), a = batched(A), b = batched(B);
  const MatrixView shape = view(c);
  Tensor out = fresh(c, shape.rows, shape.rows);
  with_element("symmetric_update", shape.dtype, [&](auto element) {
    using T = decltype(element);
    gemm::Product<T> p;
    p.batch = shape.batch, p.rows = p.cols = p.depth = shape.rows;
    p.L = strided<const T>(a), p.R = strided<const T>(b), p.E = strided<const T>(c);
    p.D = strided<T>(out);
    p.alpha = alpha, p.beta = beta, p.symmetric = true;
    p.gram = p.L.data == p.R.data && p.L.row == p.R.row && p.L.col == p.R.col &&
             p.L.batch == p.R.batch;  // of a symmetric matrix: packed once
    compute(p);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("symmetric_update", TORCH_BOX(&symmetric_update));
}

}  // namespace orthonorm
