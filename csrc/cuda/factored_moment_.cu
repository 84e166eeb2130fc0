#include "line_ops.h"

namespace orthonorm::cuda {
namespace {

void factored_moment_(const TensorList& row_moments, const TensorList& column_moments,
                      const TensorList& X, double beta2, double eps, const std::string& at,
                      bool keep_norm) {
  Call call("factored_moment_", {{"X", X, true},
                                 {"row_moments", row_moments, true},
                                 {"column_moments", column_moments, true}});
  moments(call, {beta2, eps, 1, eps_at("factored_moment_", at), true, keep_norm, true}, true, true);
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("factored_moment_", TORCH_BOX(&factored_moment_)); }

}  // namespace orthonorm::cuda
