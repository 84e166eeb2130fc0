// What an op wants of the rows and columns of matrices.
#pragma once

#include "../moments.h"

namespace orthonorm::cuda {

struct LineRule {
  double beta2, eps, scale;
  EpsAt at;
  bool moments, keep_norm, factored;  // norms of lines where there are no moments
};

}  // namespace orthonorm::cuda
