#include "../magnitude.h"

#include "elementwise.h"
#include "norms.h"

namespace orthonorm {
namespace {

Tensor magnitude(const TensorList& X) {
  const Pass<1> pass("magnitude", Unit::matrix, {{{"X", X, Use::read}}});
  std::vector<SquareSum> sums(pass.blocks());
  pass.run([&]<class A>(const Part<1>&, int64_t block, const std::array<A*, 1>& at, int64_t count) {
    specialized([&] { sums[block] = add_squares(sums[block], at[0], count); });
  });
  return norms(pass, sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("magnitude", TORCH_BOX(&magnitude));
}

}  // namespace orthonorm
