#include "magnitude.h"

#include "op.h"

namespace orthonorm::cuda {
namespace {

Tensor magnitude(const TensorList& X) {
  Call call("magnitude", {{"X", X, false}});
  call.same_shapes(2);
  return call.measured(MagnitudeOp());
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("magnitude", TORCH_BOX(&magnitude)); }

}  // namespace orthonorm::cuda
