// The 16-bit formats as they lie in memory, widened and rounded; torch-free.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace orthonorm {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

template <class To, class From>
ORTHONORM_HD inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Conversions are branch-free integer and float arithmetic: they vectorize for any instruction set,
// and unlike the AVX512-BF16 instructions they keep subnormal numbers.
ORTHONORM_HD inline float widen(float x) { return x; }
ORTHONORM_HD inline double widen(double x) { return x; }
ORTHONORM_HD inline float widen(Bf16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
ORTHONORM_HD inline float widen(Fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const float magnitude =  // the exponents' biases differ by 112; subnormals come out normal
      bit_cast<float>(static_cast<uint32_t>(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x1p16f ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | special | sign);
}

ORTHONORM_HD inline void narrow(float x, float& to) { to = x; }
ORTHONORM_HD inline void narrow(double x, double& to) { to = x; }
ORTHONORM_HD inline void narrow(float x, Bf16& to) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}
ORTHONORM_HD inline void narrow(float x, Fp16& to) {
  const uint32_t u = bit_cast<uint32_t>(x), magnitude = u & 0x7fffffff;
  // Adding 2^(e+13) leaves exactly fp16's bits of a number with exponent e in the low end of the
  // sum, rounded to nearest even; e is kept at fp16's least exponent for what is subnormal there.
  const uint32_t exponent = magnitude & 0x7f800000;
  const uint32_t floor = exponent < 0x38800000 ? 0x38800000u : exponent;
  const uint32_t bounded = floor > 0x47000000 ? 0x47000000u : floor;  // no overflow of the anchor
  const float anchor = bit_cast<float>(bounded + (13u << 23));
  const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>(magnitude) + anchor);
  const uint32_t mantissa = sum - bit_cast<uint32_t>(anchor);
  const uint32_t base = ((bounded - 0x38800000) >> 13);  // (e - least) << 10
  const uint32_t finite = mantissa + base;
  const uint32_t infinite = magnitude > 0x7f800000 ? 0x7e00u : 0x7c00u;
  const uint32_t value = magnitude >= 0x477ff000 ? infinite : finite;  // 65520 rounds to infinity
  to.bits = static_cast<uint16_t>(((u >> 16) & 0x8000) | value);
}

// A double on its way to a 16-bit format: truncated to float, its last bit set if that lost
// anything (rounding to odd), so that the final rounding is the only one.
ORTHONORM_HD inline float to_odd(double value) {
  const float near = static_cast<float>(value);
  const double back = static_cast<double>(near);
  uint32_t bits = bit_cast<uint32_t>(near);
  bits -= (back < 0 ? -back : back) > (value < 0 ? -value : value) ? 1 : 0;
  bits |= back != value && value == value ? 1 : 0;
  return bit_cast<float>(bits);
}

}  // namespace orthonorm
