#include "axis_scaling.h"

namespace orthonorm {
namespace {

Tensor column_normalize(Tensor X, double scale, double eps, std::string eps_at) {
  return axis_normalize("column_normalize", X, false, scale, eps, eps_at);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("column_normalize", TORCH_BOX(&column_normalize));
}

}  // namespace orthonorm
