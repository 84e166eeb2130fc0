// X X^T: blocks on and below the diagonal, mirrored.
#include "../orthonorm.h"

#include "gemm_words.h"

namespace orthonorm {

template void gemm::multiply(
    const Product<float>&, int64_t, const Parallel&, Isa);
template void gemm::multiply(
    const Product<double>&, int64_t, const Parallel&, Isa);
template void gemm::multiply(
    const Product<Bf16>&, int64_t, const Parallel&, Isa);
template void gemm::multiply(
    const Product<Fp16>&, int64_t, const Parallel&, Isa);
template void gemm::multiply(
    const Product<Bf16, float>&, int64_t, const Parallel&, Isa);
template void gemm::multiply(
    const Product<Fp16, float>&, int64_t, const Parallel&, Isa);

namespace {

Tensor gram(Tensor X) {
  check_matrix("gram", "X", X);
  const Tensor input = batched(X);
  const MatrixView x = view(input);
  Tensor out = fresh(input, x.rows, x.rows);
  with_element("gram", x.dtype, [&](auto element) {
    using T = decltype(element);
    gram_into(strided<const T>(input), {x.batch, x.rows, x.cols}, strided<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("gram", TORCH_BOX(&gram)); }

}  // namespace orthonorm
