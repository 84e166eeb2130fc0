#include "../rotated_adam.h"

#include "elementwise.h"

namespace orthonorm {
namespace {

void rotated_adam_(const TensorList& exp_avg, const TensorList& exp_avg_sq, const TensorList& X,
                   double beta1, double beta2, double eps, const std::optional<Tensor>& scales) {
  const Pass<3> pass("rotated_adam_", Unit::tensor,
                     {{{"exp_avg", exp_avg, Use::update},
                       {"exp_avg_sq", exp_avg_sq, Use::update},
                       {"X", X, Use::update}}});
  const std::vector<double> factors =
      scales ? numbers("rotated_adam_", "scales", *scales) : std::vector<double>(X.size(), 1.0);
  STD_TORCH_CHECK(factors.size() == X.size(), "rotated_adam_: scales must have ", X.size(),
                  " numbers, got ", factors.size());
  pass.run([&]<class A>(const Part<3>& part, int64_t, const std::array<A*, 3>& at, int64_t count) {
    const RotatedAdam<A> c(beta1, beta2, eps, factors[part.entry]);
    specialized([=] {
      A *__restrict m = at[0], *__restrict v = at[1], *__restrict x = at[2];
      for (int64_t i = 0; i < count; ++i) rotated_adam(c, m[i], v[i], x[i]);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("rotated_adam_", TORCH_BOX(&rotated_adam_));
}

}  // namespace orthonorm
