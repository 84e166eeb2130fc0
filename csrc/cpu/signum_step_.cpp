// Momentum, its sign and the decayed update in one pass, which writes no updates.
#include "../decayed_update.h"
#include "../muon_prologue.h"
#include "../sign.h"
#include "elementwise.h"

namespace orthonorm {
namespace {

void signum_step_(const TensorList& params, const TensorList& grads,
                  const TensorList& momentum_buffers, const Tensor& lr, const Tensor& momentum,
                  const Tensor& weight_decay, const std::vector<double>& factors, bool nesterov,
                  const std::optional<Tensor>& grad_scale,
                  const std::optional<Tensor>& found_inf) {
  STD_TORCH_CHECK(factors.size() == params.size(), "signum_step_: factors must have ",
                  params.size(), " numbers, got ", factors.size());
  const double rate = item(lr), mu = item(momentum), decay = item(weight_decay);
  const double scale = item_or(1, grad_scale);
  const Pass<3> pass("signum_step_", Unit::tensor,
                     {{{"params", params, Use::update},
                       {"grads", grads, Use::read},
                       {"momentum_buffers", momentum_buffers, Use::update}}});
  if (item_or(0, found_inf) != 0) return;
  pass.run([&]<class A>(const Part<3>& part, int64_t, const std::array<A*, 3>& at, int64_t count) {
    const DecayedUpdate<A> update(rate, decay, factors[part.entry]);
    const MuonPrologue<A> average(mu, nesterov, scale);
    specialized([=] {
      A *__restrict w = at[0], *__restrict b = at[2];
      const A* __restrict g = at[1];
      for (int64_t i = 0; i < count; ++i) {
        decayed_update(update, w[i], sign_or_nan(muon_prologue(average, g[i], b[i])));
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("signum_step_", TORCH_BOX(&signum_step_));
}

}  // namespace orthonorm
