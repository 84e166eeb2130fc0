#include "adamw_step_.h"

#include <unordered_set>

#include "op.h"

namespace orthonorm::cuda {
namespace {

// The count of a step kept on the host, after this one.
double counted_on_host(const Tensor& step) {
  if (step.scalar_type() == ScalarType::Double) return *static_cast<double*>(step.data_ptr()) += 1;
  return *static_cast<float*>(step.data_ptr()) += 1;
}

void check_steps(const Call& call, const TensorList& steps, const TensorList& params,
                 bool flagged) {
  std::unordered_set<const void*> seen;
  for (const Tensor& step : steps) {
    STD_TORCH_CHECK(step.is_cpu() || step.device() == params[0].device(),
                    "adamw_step_: steps must be on the CPU or the device of params");
    STD_TORCH_CHECK(!flagged || step.device() == params[0].device(),
                    "adamw_step_: steps must be on the device of params ",
                    "where found_inf is given");
    // The host counts once, and every replay would take the step of that count.
    STD_TORCH_CHECK(step.device() == params[0].device() || !call.captured(),
                    "adamw_step_: steps must be on the device of params in a CUDA graph");
    STD_TORCH_CHECK(step.numel() == 1, "adamw_step_: steps must have one element, got ",
                    step.numel());
    const ScalarType dtype = step.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                    "adamw_step_: steps must be float32 or float64");
    STD_TORCH_CHECK(seen.insert(step.data_ptr()).second,
                    "adamw_step_: steps[", seen.size(), "] is written and must not be another's");
  }
}

template <class Op>
void update(const Call& call, const Device& device, const Op& op) {
  auto lists = elementwise(device, Unit::tensor, op);
  for (size_t i = 0; i < call.size(); ++i) lists.add(call.item<Op::lists>(i));
  lists.finish();
}

void adamw_step_(const TensorList& params, const TensorList& grads, const TensorList& exp_avg,
                 const TensorList& exp_avg_sq, const TensorList& steps, const Tensor& lr,
                 double beta1, double beta2, double eps, const Tensor& weight_decay,
                 bool decay_first, bool correct_eps, const std::optional<Tensor>& rounding,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                 const std::optional<TensorList>& mantissas) {
  std::vector<NamedList> lists{{"params", params, true}};
  if (mantissas) lists.push_back({"mantissas", *mantissas, true, true});
  lists.push_back({"grads", grads, false});
  lists.push_back({"exp_avg", exp_avg, true});
  lists.push_back({"exp_avg_sq", exp_avg_sq, true});
  Call call("adamw_step_", lists);
  call.same_shapes(0);
  if (mantissas) call.halves();
  call.same_length("steps", steps.size());
  check_steps(call, steps, params, found_inf.has_value());
  const AdamWRule rule{0, beta1, beta2, eps, 0, decay_first, correct_eps};
  const AdamWNumbers numbers{call.number("lr", lr), call.number("weight_decay", weight_decay),
                             call.number("grad_scale", grad_scale, 1),
                             call.number("found_inf", found_inf, 0)};
  const Seed seed = call.seed(rounding);
  call.run([&](const Device& device) {
    auto* made = device.scratch<AdamWStep<double>>(static_cast<int64_t>(call.size()));
    auto counts = counted(device, numbers, rule, made);
    for (const Tensor& step : steps) {
      const Element type = step.scalar_type() == ScalarType::Double ? Element::f64 : Element::f32;
      const bool here = step.device() == params[0].device();
      const double known = here ? 0 : counted_on_host(step);
      char* at = here ? static_cast<char*>(step.data_ptr()) : nullptr;
      counts.add({Strided{at, type, 0, nullptr, nullptr}}, bit_cast<int64_t>(known));
    }
    counts.finish();
    if (mantissas) {
      update(call, device, HalvesAdamWOp{made, numbers.found_inf});
    } else {
      update(call, device, AdamWOp{made, seed, numbers.found_inf});
    }
  });
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("adamw_step_", TORCH_BOX(&adamw_step_)); }

}  // namespace orthonorm::cuda
