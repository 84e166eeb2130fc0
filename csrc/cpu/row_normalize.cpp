#include "axis_scaling.h"

namespace orthonorm {
namespace {

Tensor row_normalize(Tensor X, double scale, double eps, std::string eps_at) {
  return axis_normalize("row_normalize", X, true, scale, eps, eps_at);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("row_normalize", TORCH_BOX(&row_normalize)); }

}  // namespace orthonorm
