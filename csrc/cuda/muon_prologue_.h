// b <- mu b + (1-mu) g, u <- mu b + (1-mu) g or b, and |u| of every matrix before it is rounded.
#pragma once

#include "../muon_prologue.h"

#include "elementwise.h"

namespace orthonorm::cuda {

template <class A>
struct MuonPrologue {
  A mu;
  bool nesterov;
};

struct MuonPrologueOp {
  static constexpr int lists = 3;
  static constexpr unsigned reads = 0b011, writes = 0b110;
  static constexpr bool sums = true;
  template <class A>
  using Constants = MuonPrologue<A>;

  Number momentum;
  bool nesterov;

  template <class A>
  __device__ MuonPrologue<A> prepare(const Entry<3>&, int64_t) const {
    return {static_cast<A>(momentum.read()), nesterov};
  }

  template <class A>
  __device__ static A apply(const MuonPrologue<A>& c, A (&x)[3], int64_t) {
    x[2] = muon_prologue(c.mu, c.nesterov, x[0], x[1]);
    return x[2];
  }
};

}  // namespace orthonorm::cuda
