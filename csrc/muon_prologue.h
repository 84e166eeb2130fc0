// One element of `muon_prologue_`; torch-free.
#pragma once

#include <cmath>

#include "host_device.h"

namespace orthonorm {

// b <- mu b + (1-mu) g;  returns mu b + (1-mu) g of the new b if `nesterov`, else the new b.
template <class A>
ORTHONORM_HD inline A muon_prologue(A mu, bool nesterov, A g, A& b) {
  b = std::fma(mu, b - g, g);
  return nesterov ? std::fma(mu, b - g, g) : b;
}

}  // namespace orthonorm
