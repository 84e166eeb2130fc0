// w <- (1 - lr weight_decay) w - lr factor u on lists.
#pragma once

#include "../decayed_update.h"

#include "elementwise.h"
#include "rounding.h"

namespace orthonorm::cuda {

// What the entries of a launch share. An entry's extra is the item's factor.
struct UpdateNumbers {
  Number lr, weight_decay;

  template <class A>
  __device__ DecayedUpdate<A> of(int64_t factor) const {
    return {lr.read(), weight_decay.read(), bit_cast<double>(factor)};
  }
};

struct DecayedUpdateOp {
  static constexpr int lists = 2;
  static constexpr unsigned reads = 0b11, writes = 0b01;
  static constexpr Measure measure = Measure::nothing;
  template <class A>
  struct Constants {
    DecayedUpdate<A> rule;
    Rounding rounding;
  };

  UpdateNumbers numbers;
  Seed seed = {};
  Number found_inf = 0;

  template <class A>
  __device__ Constants<A> prepare(const Entry<2>& entry, int64_t) const {
    return {numbers.of<A>(entry.extra), {seed, entry.type[0]}};
  }

  template <class A>
  __device__ static A apply(const Constants<A>& c, A (&x)[2], int64_t place) {
    decayed_update(c.rule, x[0], x[1]);
    return x[0] = c.rounding(x[0], place);
  }
};

// Of float32 weights kept as halves, lists 0 and 1; with updates before mantissas, ptxas 13.0 spills
// a register on sm_100a (2026-11).
struct HalvesUpdateOp {
  static constexpr int lists = 3;
  static constexpr unsigned reads = 0b111, writes = 0b011, integers = 0b010;
  static constexpr Measure measure = Measure::nothing;
  template <class A>
  using Constants = DecayedUpdate<A>;

  UpdateNumbers numbers;
  Number found_inf = 0;

  template <class A>
  __device__ DecayedUpdate<A> prepare(const Entry<3>& entry, int64_t) const {
    return numbers.of<A>(entry.extra);
  }

  template <class A>
  __device__ static A apply(const DecayedUpdate<A>& c, A (&x)[3], int64_t) {
    decayed_update(c, x[0], x[2], x[1]);
    return x[0];
  }
};

}  // namespace orthonorm::cuda
