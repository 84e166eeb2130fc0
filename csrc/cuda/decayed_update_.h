// w <- (1 - lr weight_decay) w - lr factor u on lists.
#pragma once

#include "../decayed_update.h"

#include "elementwise.h"

namespace orthonorm::cuda {

struct DecayedUpdateOp {
  static constexpr int lists = 2;
  static constexpr unsigned reads = 0b11, writes = 0b01;
  static constexpr bool sums = false;
  template <class A>
  using Constants = DecayedUpdate<A>;

  Number lr;
  double weight_decay;

  // An entry's extra is the item's factor.
  template <class A>
  __device__ DecayedUpdate<A> prepare(const Entry<2>& entry, int64_t) const {
    return {lr.read(), weight_decay, bit_cast<double>(entry.extra)};
  }

  template <class A>
  __device__ static A apply(const DecayedUpdate<A>& c, A (&x)[2]) {
    decayed_update(c, x[0], x[1]);
    return x[0];
  }
};

}  // namespace orthonorm::cuda
