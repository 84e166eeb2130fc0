// Momentum b of g / grad_scale, u of both or b, and |u| of every matrix before it is rounded.
#pragma once

#include "../muon_prologue.h"

#include "elementwise.h"

namespace orthonorm::cuda {

struct MuonPrologueOp {
  static constexpr int lists = 3;
  static constexpr unsigned reads = 0b011, writes = 0b110;
  static constexpr Measure measure = Measure::norm;
  template <class A>
  using Constants = MuonPrologue<A>;

  Number momentum;
  bool nesterov;
  Number grad_scale = 1, found_inf = 0;

  template <class A>
  __device__ MuonPrologue<A> prepare(const Entry<3>&, int64_t) const {
    return {momentum.read(), nesterov, grad_scale.read(), found_inf.read()};
  }

  template <class A>
  __device__ static A apply(const MuonPrologue<A>& c, A (&x)[3], int64_t) {
    x[2] = muon_prologue(c, x[0], x[1]);
    return x[2];
  }
};

}  // namespace orthonorm::cuda
