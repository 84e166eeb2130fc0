#include "../decayed_update.h"

#include "elementwise.h"

namespace orthonorm {
namespace {

// Of float32 weights that are kept as halves.
void update_halves(const TensorList& params, const TensorList& updates, const TensorList& mantissas,
                   double lr, double weight_decay, const std::vector<double>& factors,
                   const std::optional<Tensor>& found_inf) {
  const Pass<3> pass("decayed_update_", Unit::tensor,
                     {{{"params", params, Use::update, ScalarType::BFloat16},
                       {"updates", updates, Use::read},
                       {"mantissas", mantissas, Use::update, ScalarType::Short}}});
  if (item_or(0, found_inf) != 0) return;
  pass.run([&]<class A>(const Part<3>& part, int64_t, const std::array<A*, 3>& at, int64_t count) {
    const DecayedUpdate<A> c(lr, weight_decay, factors[part.entry]);
    specialized([=] {
      A *__restrict w = at[0], *__restrict rest = at[2];
      const A* __restrict u = at[1];
      for (int64_t i = 0; i < count; ++i) decayed_update(c, w[i], u[i], rest[i]);
    });
  });
}

void decayed_update_(const TensorList& params, const TensorList& updates, const Tensor& lr,
                     const Tensor& weight_decay, const std::vector<double>& factors,
                     const std::optional<Tensor>& rounding, const std::optional<Tensor>& found_inf,
                     const std::optional<TensorList>& mantissas) {
  STD_TORCH_CHECK(factors.size() == params.size(), "decayed_update_: factors must have ",
                  params.size(), " numbers, got ", factors.size());
  const double rate = item(lr), decay = item(weight_decay);
  if (mantissas) {
    return update_halves(params, updates, *mantissas, rate, decay, factors, found_inf);
  }
  const Pass<2> pass("decayed_update_", Unit::tensor,
                     {{{"params", params, Use::update}, {"updates", updates, Use::read}}},
                     rounding);
  if (item_or(0, found_inf) != 0) return;
  pass.run([&]<class A>(const Part<2>& part, int64_t, const std::array<A*, 2>& at, int64_t count) {
    const DecayedUpdate<A> c(rate, decay, factors[part.entry]);
    specialized([=] {
      A* __restrict w = at[0];
      const A* __restrict u = at[1];
      for (int64_t i = 0; i < count; ++i) decayed_update(c, w[i], u[i]);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("decayed_update_", TORCH_BOX(&decayed_update_));
}

}  // namespace orthonorm
