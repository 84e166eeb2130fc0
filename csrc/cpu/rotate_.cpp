// out <- X in the basis Q.
#include "rotations.h"

namespace orthonorm {
namespace {

void rotate_(const Tensor& out, const Tensor& X, const Tensor& Q) {
  Rotation{"rotate_", true, 1.0, 0.0}(out, X, Q);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("rotate_", TORCH_BOX(&rotate_)); }

}  // namespace orthonorm
