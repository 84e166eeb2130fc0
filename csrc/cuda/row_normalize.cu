#include "line_ops.h"

namespace orthonorm::cuda {
namespace {

Tensor row_normalize(const Tensor& X, double scale, double eps, const std::string& eps_at) {
  return normalized("row_normalize", X, true, scale, eps, eps_at);
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("row_normalize", TORCH_BOX(&row_normalize)); }

}  // namespace orthonorm::cuda
