#include "axis_scaling.h"

namespace orthonorm {
namespace {

void row_moment_(TensorList moments, TensorList X, double beta2, double eps, std::string eps_at,
                 bool keep_norm) {
  axis_moment("row_moment_", moments, X, true, beta2, eps, eps_at, keep_norm);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("row_moment_", TORCH_BOX(&row_moment_)); }

}  // namespace orthonorm
