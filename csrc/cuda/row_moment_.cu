#include "line_ops.h"

namespace orthonorm::cuda {
namespace {

void row_moment_(const TensorList& moments_, const TensorList& X, double beta2, double eps,
                 const std::string& at, bool keep_norm) {
  Call call("row_moment_", {{"X", X, true}, {"moments", moments_, true}});
  moments(call, {beta2, eps, 1, eps_at("row_moment_", at), true, keep_norm, false}, true, false);
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("row_moment_", TORCH_BOX(&row_moment_)); }

}  // namespace orthonorm::cuda
