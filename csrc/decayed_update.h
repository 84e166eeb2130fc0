// One element of `decayed_update_`; torch-free.
#pragma once

#include <cmath>

#include "mantissa.h"

namespace orthonorm {

// What is constant over one tensor. Made in double, converted once to the tensor's arithmetic.
template <class A>
struct DecayedUpdate {
  A decay, step;

  ORTHONORM_HD DecayedUpdate(double lr, double weight_decay, double factor)
      : decay(static_cast<A>(1 - lr * weight_decay)), step(static_cast<A>(lr * factor)) {}
};

// w <- (1 - lr weight_decay) w - lr factor u.
template <class A>
ORTHONORM_HD inline void decayed_update(const DecayedUpdate<A>& c, A& w, A u) {
  w = std::fma(-c.step, u, c.decay * w);
}

// The same of the float that `w` and `mantissa` are the halves of.
template <class A>
ORTHONORM_HD inline void decayed_update(const DecayedUpdate<A>& c, A& w, A u, A& mantissa) {
  A whole = static_cast<A>(joined(w, mantissa));
  decayed_update(c, whole, u);
  split(static_cast<float>(whole), w, mantissa);
}

}  // namespace orthonorm
