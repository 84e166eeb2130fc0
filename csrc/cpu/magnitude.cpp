#include "../magnitude.h"

#include "elementwise.h"
#include "norms.h"

namespace orthonorm {
namespace {

Tensor magnitude(const TensorList& X) {
  const Pass<1> pass("magnitude", Unit::matrix, {{{"X", X, Use::read}}});
  std::vector<SquareSum> sums(pass.blocks());
  pass.run([&]<class A>(const Part<1>& part, int64_t begin, const std::array<A*, 1>& at,
                        int64_t count) {
    SquareSum& sum = sums[part.block(begin)];
    specialized([&] { sum = add_squares(sum, at[0], count); });
  });
  return norms(pass, sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("magnitude", TORCH_BOX(&magnitude));
}

}  // namespace orthonorm
