#include "cluster_gram_polynomial.h"

#include "polynomial_op.h"

namespace orthonorm::cuda {
namespace {

Tensor gram_polynomial(const Tensor& R, const std::vector<double>& coefficients) {
  return polynomial_of("gram_polynomial", "R", R, coefficients, true,
                       gram_polynomial_lists<Fp16>, gram_polynomial_lists<Bf16>);
}

}  // namespace

ORTHONORM_CUDA_PART(gram_polynomial, "(Tensor R, float[] coefficients) -> Tensor")

}  // namespace orthonorm::cuda
