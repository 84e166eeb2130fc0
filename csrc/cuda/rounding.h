// How kernels round the weights they write: to nearest, or stochastically by a seed they read.
#pragma once

#include "../rounding.h"

#include "elements.h"

namespace orthonorm::cuda {

// A seed that the host knew, or one on the device; without either, rounding is to nearest.
struct Seed {
  bool given = false;
  int64_t value = 0;
  const int64_t* at = nullptr;
};

// Numbers on their way to one tensor.
class Rounding {
 public:
  __device__ Rounding(const Seed& seed, Element type)
      : wanted_(seed.given && type == Element::bf16),
        stochastic_(wanted_ && seed.at ? *seed.at : seed.value) {}

  template <class A>
  __device__ A operator()(A x, int64_t place) const {
    return wanted_ ? static_cast<A>(stochastic_(x, place)) : x;
  }

 private:
  bool wanted_;
  Stochastic stochastic_;
};

}  // namespace orthonorm::cuda
