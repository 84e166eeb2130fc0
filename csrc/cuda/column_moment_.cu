#include "line_ops.h"

namespace orthonorm::cuda {
namespace {

void column_moment_(const TensorList& moments_, const TensorList& X, double beta2, double eps,
                 const std::string& at, bool keep_norm) {
  Call call("column_moment_", {{"X", X, true}, {"moments", moments_, true}});
  moments(call, {beta2, eps, 1, eps_at("column_moment_", at), true, keep_norm, false}, false, true);
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("column_moment_", TORCH_BOX(&column_moment_)); }

}  // namespace orthonorm::cuda
