#include "../muon_prologue.h"

#include "elementwise.h"
#include "norms.h"

namespace orthonorm {
namespace {

template <class A>
void average(const MuonPrologue<A> c, const A* __restrict g, A* __restrict b, A* __restrict u,
             int64_t count) {
  for (int64_t i = 0; i < count; ++i) u[i] = muon_prologue(c, g[i], b[i]);
}

// Averages a run piece by piece and adds the squares of each while it is in L1, not yet rounded.
template <class A>
SquareSum average_and_measure(SquareSum sum, const MuonPrologue<A>& c, const A* g, A* b, A* u,
                              int64_t count) {
  for (int64_t i = 0; i < count; i += piece) {
    const int64_t length = std::min(piece, count - i);
    average(c, g + i, b + i, u + i, length);
    sum = add_squares(sum, u + i, length);
  }
  return sum;
}

Tensor muon_prologue_(const TensorList& grads, const TensorList& momentum_buffers,
                      const TensorList& updates, const Tensor& momentum, bool nesterov,
                      const std::optional<Tensor>& grad_scale,
                      const std::optional<Tensor>& found_inf) {
  const Pass<3> pass("muon_prologue_", Unit::matrix,
                     {{{"grads", grads, Use::read},
                       {"momentum_buffers", momentum_buffers, Use::update},
                       {"updates", updates, Use::write}}});
  const double mu = item(momentum), scale = item_or(1, grad_scale), inf = item_or(0, found_inf);
  std::vector<SquareSum> sums(pass.blocks());
  pass.run([&]<class A>(const Part<3>& part, int64_t begin, const std::array<A*, 3>& at,
                        int64_t count) {
    SquareSum& sum = sums[part.block(begin)];
    const MuonPrologue<A> c(mu, nesterov, scale, inf);
    specialized([&] { sum = average_and_measure(sum, c, at[0], at[1], at[2], count); });
  });
  return norms(pass, sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("muon_prologue_", TORCH_BOX(&muon_prologue_));
}

}  // namespace orthonorm
