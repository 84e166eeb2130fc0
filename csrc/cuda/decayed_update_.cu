#include "decayed_update_.h"

#include "op.h"

namespace orthonorm::cuda {
namespace {

void decayed_update_(const TensorList& params, const TensorList& updates, const Tensor& lr,
                     double weight_decay, const std::vector<double>& factors,
                     const std::optional<Tensor>& rounding) {
  Call call("decayed_update_", {{"params", params, true}, {"updates", updates, false}});
  call.same_shapes(0);
  call.same_length("factors", factors.size());
  const DecayedUpdateOp op{call.number("lr", lr), weight_decay, call.seed(rounding)};
  call.run([&](const Device& device) {
    auto lists = elementwise(device, Unit::tensor, op);
    for (size_t i = 0; i < call.size(); ++i) {
      lists.add(call.item<2>(i), bit_cast<int64_t>(factors[i]));
    }
    lists.finish();
  });
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("decayed_update_", TORCH_BOX(&decayed_update_)); }

}  // namespace orthonorm::cuda
