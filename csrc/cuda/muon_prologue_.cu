#include "muon_prologue_.h"

#include "op.h"

namespace orthonorm::cuda {
namespace {

Tensor muon_prologue_(const TensorList& grads, const TensorList& momentum_buffers,
                      const TensorList& updates, const Tensor& momentum, bool nesterov,
                      const std::optional<Tensor>& grad_scale,
                      const std::optional<Tensor>& found_inf) {
  Call call("muon_prologue_", {{"grads", grads, false},
                               {"momentum_buffers", momentum_buffers, true},
                               {"updates", updates, true}});
  call.same_shapes(2);
  const MuonPrologueOp op{call.number("momentum", momentum), nesterov,
                          call.number("grad_scale", grad_scale, 1),
                          call.number("found_inf", found_inf, 0)};
  return call.measured(op);
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("muon_prologue_", TORCH_BOX(&muon_prologue_)); }

}  // namespace orthonorm::cuda
