#include "../elementwise_moment.h"

#include "elementwise.h"
#include "norms.h"

namespace orthonorm {
namespace {

template <class A>
void normalize(const ElementwiseMoment<A>& c, A* __restrict v, A* __restrict x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) elementwise_moment(c, v[i], x[i]);
}

Tensor elementwise_moment_(const TensorList& moments, const TensorList& X, double beta2, double eps,
                           const std::optional<Tensor>& corrections) {
  const Pass<2> pass("elementwise_moment_", Unit::matrix,
                     {{{"moments", moments, Use::update}, {"X", X, Use::update}}});
  const std::vector<double> roots =
      corrections ? numbers("elementwise_moment_", "corrections", *corrections)
                  : std::vector<double>(X.size(), 1.0);
  STD_TORCH_CHECK(roots.size() == X.size(), "elementwise_moment_: corrections must have ",
                  X.size(), " numbers, got ", roots.size());
  std::vector<SquareSum> sums(pass.blocks());
  pass.run([&]<class A>(const Part<2>& part, int64_t begin, const std::array<A*, 2>& at,
                        int64_t count) {
    const ElementwiseMoment<A> c(beta2, eps, roots[part.entry]);
    SquareSum& sum = sums[part.block(begin)];
    specialized([&] {
      for (int64_t i = 0; i < count; i += piece) {  // measured while it is in L1, not yet rounded
        const int64_t length = std::min(piece, count - i);
        normalize(c, at[0] + i, at[1] + i, length);
        sum = add_squares(sum, at[1] + i, length);
      }
    });
  });
  return norms(pass, sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("elementwise_moment_", TORCH_BOX(&elementwise_moment_));
}

}  // namespace orthonorm
