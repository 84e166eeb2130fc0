#include "decayed_update_.h"

#include "op.h"

namespace orthonorm::cuda {
namespace {

template <class Op>
void update(Call& call, const Op& op, const std::vector<double>& factors) {
  call.run([&](const Device& device) {
    auto lists = elementwise(device, Unit::tensor, op);
    for (size_t i = 0; i < call.size(); ++i) {
      lists.add(call.item<Op::lists>(i), bit_cast<int64_t>(factors[i]));
    }
    lists.finish();
  });
}

void decayed_update_(const TensorList& params, const TensorList& updates, const Tensor& lr,
                     const Tensor& weight_decay, const std::vector<double>& factors,
                     const std::optional<Tensor>& rounding, const std::optional<Tensor>& found_inf,
                     const std::optional<TensorList>& mantissas) {
  std::vector<NamedList> lists{{"params", params, true}};
  if (mantissas) lists.push_back({"mantissas", *mantissas, true, true});
  lists.push_back({"updates", updates, false});
  Call call("decayed_update_", lists);
  call.same_shapes(0);
  call.same_length("factors", factors.size());
  const UpdateNumbers numbers{call.number("lr", lr),
                              call.number("weight_decay", weight_decay)};
  const Number inf = call.number("found_inf", found_inf, 0);
  if (!mantissas) {
    return update(call, DecayedUpdateOp{numbers, call.seed(rounding), inf}, factors);
  }
  call.halves();
  update(call, HalvesUpdateOp{numbers, inf}, factors);
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("decayed_update_", TORCH_BOX(&decayed_update_)); }

}  // namespace orthonorm::cuda
