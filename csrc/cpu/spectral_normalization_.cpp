#include <tuple>

#include "power_lists.h"

namespace orthonorm {
namespace {

std::tuple<Tensor, Tensor> spectral_normalization_(const TensorList& out, const TensorList& W,
                                                   const TensorList& u, const TensorList& v,
                                                   int64_t steps, const std::string& order,
                                                   double eps) {
  const PowerLists lists("spectral_normalization_", W, u, v, &out, steps, order, eps);
  lists.iterate();
  return {lists.sigma(), lists.vectors()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("spectral_normalization_", TORCH_BOX(&spectral_normalization_));
}

}  // namespace orthonorm
