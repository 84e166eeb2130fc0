// x <- sign(x), NaN where x is not finite.
#include "../sign.h"

#include "elementwise.h"

namespace orthonorm {
namespace {

void sign_(const TensorList& X) {
  const Pass<1> pass("sign_", Unit::tensor, {{{"X", X, Use::update}}});
  pass.run([&]<class A>(const Part<1>&, int64_t, const std::array<A*, 1>& at, int64_t count) {
    specialized([=] {
      A* __restrict x = at[0];
      for (int64_t i = 0; i < count; ++i) x[i] = sign_or_nan(x[i]);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("sign_", TORCH_BOX(&sign_)); }

}  // namespace orthonorm
