#include "../muon_prologue.h"

#include "elementwise.h"
#include "norms.h"

namespace orthonorm {
namespace {

template <bool nesterov, class A>
void average(A mu, const A* __restrict g, A* __restrict b, A* __restrict u, int64_t count) {
  for (int64_t i = 0; i < count; ++i) u[i] = muon_prologue(mu, nesterov, g[i], b[i]);
}

Tensor muon_prologue_(const TensorList& grads, const TensorList& momentum_buffers,
                      const TensorList& updates, const Tensor& momentum, bool nesterov) {
  const Pass<3> pass("muon_prologue_", Unit::matrix,
                     {{{"grads", grads, Use::read},
                       {"momentum_buffers", momentum_buffers, Use::update},
                       {"updates", updates, Use::write}}});
  const double mu = item(momentum);
  std::vector<SquareSum> sums(pass.blocks());
  pass.run([&]<class A>(const Part<3>&, int64_t block, const std::array<A*, 3>& at, int64_t count) {
    specialized([&] {
      if (nesterov) {
        average<true>(static_cast<A>(mu), at[0], at[1], at[2], count);
      } else {
        average<false>(static_cast<A>(mu), at[0], at[1], at[2], count);
      }
      sums[block] = sums[block] + square_sum(at[2], count);  // still in L1, not yet rounded
    });
  });
  return norms(pass, sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("muon_prologue_", TORCH_BOX(&muon_prologue_));
}

}  // namespace orthonorm
