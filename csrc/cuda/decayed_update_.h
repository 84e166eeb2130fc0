// w <- (1 - lr weight_decay) w - lr factor u on lists.
#pragma once

#include "../decayed_update.h"

#include "elementwise.h"
#include "rounding.h"

namespace orthonorm::cuda {

struct DecayedUpdateOp {
  static constexpr int lists = 2;
  static constexpr unsigned reads = 0b11, writes = 0b01;
  static constexpr bool sums = false;
  template <class A>
  struct Constants {
    DecayedUpdate<A> rule;
    Rounding rounding;
  };

  Number lr;
  double weight_decay;
  Seed seed = {};

  // An entry's extra is the item's factor.
  template <class A>
  __device__ Constants<A> prepare(const Entry<2>& entry, int64_t) const {
    return {{lr.read(), weight_decay, bit_cast<double>(entry.extra)}, {seed, entry.type[0]}};
  }

  template <class A>
  __device__ static A apply(const Constants<A>& c, A (&x)[2], int64_t place) {
    decayed_update(c.rule, x[0], x[1]);
    return x[0] = c.rounding(x[0], place);
  }
};

}  // namespace orthonorm::cuda
