#include "line_ops.h"

namespace orthonorm::cuda {
namespace {

Tensor column_normalize(const Tensor& X, double scale, double eps, const std::string& eps_at) {
  return normalized("column_normalize", X, false, scale, eps, eps_at);
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("column_normalize", TORCH_BOX(&column_normalize)); }

}  // namespace orthonorm::cuda
