#include "power_lists.h"

namespace orthonorm {
namespace {

Tensor power_iteration_(const TensorList& W, const TensorList& u, const TensorList& v,
                        int64_t steps, const std::string& order, double eps) {
  const PowerLists lists("power_iteration_", W, u, v, nullptr, steps, order, eps);
  lists.iterate();
  return lists.sigma();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("power_iteration_", TORCH_BOX(&power_iteration_));
}

}  // namespace orthonorm
