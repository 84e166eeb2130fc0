#include "adamw_counts.h"
#include "elementwise.h"

namespace orthonorm {
namespace {

// Of float32 weights that are kept as halves.
void update_halves(const Pass<5>& pass, const std::vector<AdamWStep<double>>& made) {
  pass.run([&]<class A>(const Part<5>& part, int64_t, const std::array<A*, 5>& at, int64_t count) {
    const AdamWStep<A> c(made[part.entry]);
    specialized([=] {
      A *__restrict w = at[0], *__restrict m = at[2], *__restrict v = at[3];
      A* __restrict rest = at[4];
      const A* __restrict g = at[1];
      for (int64_t i = 0; i < count; ++i) adamw_step(c, w[i], g[i], m[i], v[i], rest[i]);
    });
  });
}

void adamw_step_(const TensorList& params, const TensorList& grads, const TensorList& exp_avg,
                 const TensorList& exp_avg_sq, const TensorList& steps, const Tensor& lr,
                 double beta1, double beta2, double eps, const Tensor& weight_decay,
                 bool decay_first, bool correct_eps, const std::optional<Tensor>& rounding,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                 const std::optional<TensorList>& mantissas) {
  const AdamWRule rule{item(lr),    beta1,       beta2, eps, item(weight_decay),
                       decay_first, correct_eps, item_or(1, grad_scale)};
  const bool found = item_or(0, found_inf) != 0;
  if (mantissas) {
    const Pass<5> pass("adamw_step_", Unit::tensor,
                       {{{"params", params, Use::update, ScalarType::BFloat16},
                         {"grads", grads, Use::read},
                         {"exp_avg", exp_avg, Use::update},
                         {"exp_avg_sq", exp_avg_sq, Use::update},
                         {"mantissas", *mantissas, Use::update, ScalarType::Short}}});
    check_steps("adamw_step_", steps, params.size());
    if (!found) update_halves(pass, advance(steps, rule));
    return;
  }
  const Pass<4> pass("adamw_step_", Unit::tensor,
                     {{{"params", params, Use::update},
                       {"grads", grads, Use::read},
                       {"exp_avg", exp_avg, Use::update},
                       {"exp_avg_sq", exp_avg_sq, Use::update}}},
                     rounding);
  check_steps("adamw_step_", steps, params.size());
  if (found) return;
  const std::vector<AdamWStep<double>> made = advance(steps, rule);
  pass.run([&]<class A>(const Part<4>& part, int64_t, const std::array<A*, 4>& at, int64_t count) {
    const AdamWStep<A> c(made[part.entry]);
    specialized([=] {
      A *__restrict w = at[0], *__restrict m = at[2], *__restrict v = at[3];
      const A* __restrict g = at[1];
      for (int64_t i = 0; i < count; ++i) adamw_step(c, w[i], g[i], m[i], v[i]);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
}

}  // namespace orthonorm
