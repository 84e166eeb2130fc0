#include "axis_scaling.h"

namespace orthonorm {
namespace {

void column_moment_(TensorList moments, TensorList X, double beta2, double eps, std::string eps_at,
                 bool keep_norm) {
  axis_moment("column_moment_", moments, X, false, beta2, eps, eps_at, keep_norm);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("column_moment_", TORCH_BOX(&column_moment_));
}

}  // namespace orthonorm
