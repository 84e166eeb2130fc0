// Stochastic rounding to bfloat16, as `ops/rounding.py` defines it; torch-free.
#pragma once

#include "elements.h"

namespace orthonorm {

// A permutation of 32 bits that looks random: lowbias32, https://nullprogram.com/blog/2018/07/31
ORTHONORM_HD inline uint32_t hashed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

inline constexpr uint32_t golden = 0x9e3779b9u;  // 2^32 / golden ratio

// Of a seed: rounds by 16 random bits for every place, an element's distance in memory from the
// first one of its tensor.
class Stochastic {
 public:
  ORTHONORM_HD explicit Stochastic(int64_t seed)
      : key_(hashed(hashed(low(seed) ^ golden) ^ high(seed))) {}

  // x as a float that bfloat16 has; NaN stays NaN.
  ORTHONORM_HD float operator()(float x, int64_t place) const {
    const uint32_t random = hashed(key_ ^ low(place) ^ high(place) * golden) & 0xffff;
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t cut = (bits + random) & 0xffff0000u;
    return bit_cast<float>((bits & 0x7fffffff) > 0x7f800000 ? bits : cut);
  }
  ORTHONORM_HD double operator()(double x, int64_t place) const {
    return (*this)(static_cast<float>(x), place);
  }

 private:
  ORTHONORM_HD static uint32_t low(int64_t x) { return static_cast<uint32_t>(x); }
  ORTHONORM_HD static uint32_t high(int64_t x) {
    return static_cast<uint32_t>(static_cast<uint64_t>(x) >> 32);
  }

  uint32_t key_;
};

}  // namespace orthonorm
