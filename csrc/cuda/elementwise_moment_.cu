#include "elementwise_moment_.h"

#include "op.h"

namespace orthonorm::cuda {
namespace {

Tensor elementwise_moment_(const TensorList& moments, const TensorList& X, double beta2, double eps,
                           const std::optional<Tensor>& corrections) {
  Call call("elementwise_moment_", {{"moments", moments, true}, {"X", X, true}});
  call.same_shapes(2);
  if (corrections) call.same_length("corrections", corrections->numel());
  const Number roots = corrections ? call.numbers("corrections", *corrections) : Number(1);
  return call.measured(ElementwiseMomentOp{beta2, eps, roots});
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("elementwise_moment_", TORCH_BOX(&elementwise_moment_)); }

}  // namespace orthonorm::cuda
