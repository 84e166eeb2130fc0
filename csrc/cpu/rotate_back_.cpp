// W <- decay W - N in the original basis.
#include "rotations.h"

namespace orthonorm {
namespace {

void rotate_back_(const Tensor& W, const Tensor& N, const Tensor& Q,
                  const std::optional<Tensor>& decay) {
  Rotation{"rotate_back_", false, -1.0, decay ? item(*decay) : 1.0}(W, N, Q);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("rotate_back_", TORCH_BOX(&rotate_back_)); }

}  // namespace orthonorm
