#include "inner.h"

#include "op.h"

namespace orthonorm::cuda {
namespace {

Tensor inner(const TensorList& X, const TensorList& Y) {
  Call call("inner", {{"X", X, false}, {"Y", Y, false}});
  call.same_shapes(2);
  return call.measured(InnerOp());
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("inner", TORCH_BOX(&inner)); }

}  // namespace orthonorm::cuda
