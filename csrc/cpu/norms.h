// Sums of squares of runs of elements, and a norm for each matrix of a pass from its blocks' sums.
#pragma once

#include "../magnitude.h"
#include "elementwise.h"

namespace orthonorm {

// Adds x_i^2 in pieces of one size, so that runs of any multiple of it, and with them converted and
// unconverted tensors, are added in the same order. A piece fits L1.
template <class A>
inline SquareSum add_squares(SquareSum total, const A* x, int64_t count) {
  for (int64_t i = 0; i < count; i += piece) {
    total = total + square_sum(x + i, std::min(piece, count - i));
  }
  return total;
}

// Adds the blocks of every matrix in their order; float64, one number for each part.
template <int N>
Tensor norms(const Pass<N>& pass, const std::vector<SquareSum>& sums) {
  const int64_t count = static_cast<int64_t>(pass.parts().size());
  Tensor result = torch::stable::empty({count}, ScalarType::Double, std::nullopt,
                                       torch::stable::Device(torch::headeronly::DeviceType::CPU));
  double* to = static_cast<double*>(result.data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    const Part<N>& part = pass.parts()[i];
    SquareSum total;
    for (int64_t b = 0; b < Pass<N>::blocks(part.count); ++b) {
      total = total + sums[part.first_block + b];
    }
    to[i] = total.norm();
  }
  return result;
}

}  // namespace orthonorm
