// A float in two halves: a bfloat16 weight, and what its bits lack of the float's; torch-free.
//
// `ops/mantissa.py` defines them. Both halves travel through kernels as numbers: -2^15 to 2^15 - 1
// are exact in any arithmetic.
#pragma once

#include "elements.h"

namespace orthonorm {

template <class A>
ORTHONORM_HD inline float joined(A weight, A mantissa) {
  const uint32_t high = bit_cast<uint32_t>(static_cast<float>(weight));
  const int32_t low = static_cast<int32_t>(mantissa);
  const bool none = low < 0 && !(high << 1);  // a zero written over a weight: no number is below it
  return bit_cast<float>(high + static_cast<uint32_t>(none ? 0 : low));
}

// The nearest bfloat16, ties away from zero, and the rest; NaN is one NaN.
template <class A>
ORTHONORM_HD inline void split(float x, A& weight, A& mantissa) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t real = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000u : bits;
  const uint32_t high = (real + 0x8000u) & 0xffff0000u;
  weight = static_cast<A>(bit_cast<float>(high));
  mantissa = static_cast<A>(static_cast<int32_t>(real - high));
}

}  // namespace orthonorm
