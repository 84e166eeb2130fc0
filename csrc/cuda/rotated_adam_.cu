#include "rotated_adam_.h"

#include "op.h"

namespace orthonorm::cuda {
namespace {

void rotated_adam_(const TensorList& exp_avg, const TensorList& exp_avg_sq, const TensorList& X,
                   double beta1, double beta2, double eps, const std::optional<Tensor>& scales) {
  Call call("rotated_adam_",
            {{"exp_avg", exp_avg, true}, {"exp_avg_sq", exp_avg_sq, true}, {"X", X, true}});
  call.same_shapes(0);
  if (scales) call.same_length("scales", scales->numel());
  const Number factors = scales ? call.numbers("scales", *scales) : Number(1);
  const RotatedAdamOp op{beta1, beta2, eps, factors};
  call.run([&](const Device& device) {
    auto lists = elementwise(device, Unit::tensor, op);
    for (size_t i = 0; i < call.size(); ++i) lists.add(call.item<3>(i));
    lists.finish();
  });
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("rotated_adam_", TORCH_BOX(&rotated_adam_)); }

}  // namespace orthonorm::cuda
