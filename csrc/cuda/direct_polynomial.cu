#include "cluster_direct_polynomial.h"

#include "polynomial_op.h"

namespace orthonorm::cuda {
namespace {

Tensor direct_polynomial(const Tensor& X, const std::vector<double>& coefficients) {
  return polynomial_of("direct_polynomial", "X", X, coefficients, false,
                       direct_polynomial_lists<Fp16>, direct_polynomial_lists<Bf16>);
}

}  // namespace

ORTHONORM_CUDA_PART(direct_polynomial, "(Tensor X, float[] coefficients) -> Tensor")

}  // namespace orthonorm::cuda
