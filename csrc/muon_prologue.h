// One element of `muon_prologue_`; torch-free.
#pragma once

#include <cmath>

#include "host_device.h"

namespace orthonorm {

// What is constant over a list. Made in double, converted once to the arithmetic of a matrix.
template <class A>
struct MuonPrologue {
  A mu, unscale;
  bool nesterov, keep;

  ORTHONORM_HD MuonPrologue(double mu, bool nesterov, double grad_scale = 1, double found_inf = 0)
      : mu(static_cast<A>(mu)),
        unscale(static_cast<A>(1 / grad_scale)),
        nesterov(nesterov),
        keep(found_inf != 0) {}
};

// With x = g / grad_scale: b <- mu b + (1-mu) x, but for an infinity that was found; returns
// mu b + (1-mu) x of the new b if `nesterov`, else the new b.
template <class A>
ORTHONORM_HD inline A muon_prologue(const MuonPrologue<A>& c, A g, A& b) {
  const A x = c.unscale * g;
  const A average = std::fma(c.mu, b - x, x);
  b = c.keep ? b : average;
  return c.nesterov ? std::fma(c.mu, average - x, x) : average;
}

}  // namespace orthonorm
