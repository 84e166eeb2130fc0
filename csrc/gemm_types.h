// Elements, lanes and operands of the packed products in gemm.h; torch-free.
//
// An element is what a tensor stores; a lane is what a packed panel holds and a product consumes:
// the float or double itself, a 16-bit element widened to float, or a pair of bfloat16 neighbours
// along the depth for the processor's pairwise dot product.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace orthonorm::gemm {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
struct Pair {
  uint32_t bits;  // element 2k in the low half, 2k + 1 in the high half
};

// What products of a lane are summed in.
template <class Lane>
using Sum = std::conditional_t<std::is_same_v<Lane, double>, double, float>;

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Conversions are branch-free integer and float arithmetic: they vectorize for any instruction set,
// and unlike the AVX512-BF16 instructions they keep subnormal numbers.
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const float magnitude =  // the exponents' biases differ by 112; subnormals come out normal
      bit_cast<float>(static_cast<uint32_t>(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x1p16f ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | special | sign);
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, Bf16& to) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}
inline void narrow(float x, Fp16& to) {
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

// One operand: element (i, j) of matrix b at data[b batch + i row + j col].
template <class T>
struct Strided {
  T* data = nullptr;
  int64_t row = 0, col = 0, batch = 0;

  T* at(int64_t i, int64_t j) const { return data + i * row + j * col; }
  Strided transposed() const { return {data, col, row, batch}; }
  Strided matrix(int64_t b) const { return {data == nullptr ? data : data + b * batch, row, col}; }
};

// D = alpha L R + beta E for L rows x depth, R depth x cols, E and D rows x cols, in every matrix
// of a batch.
//
// T is the dtype of L and R, O of E and D. No E: its data is null. D may be E (each element is read
// before it is written) but must not overlap L or R.
template <class T, class O = T>
struct Product {
  int64_t batch = 1, rows = 0, cols = 0, depth = 0;
  Strided<const T> L, R;
  Strided<const O> E;
  Strided<O> D;
  double alpha = 1.0, beta = 0.0;
  bool symmetric = false;  // square: only blocks on and below the diagonal, then mirrored
  bool gram = false;       // R is L transposed, and is not read

  Product matrix(int64_t b) const {
    Product one = *this;
    one.batch = 1;
    one.L = L.matrix(b), one.R = R.matrix(b), one.E = E.matrix(b), one.D = D.matrix(b);
    return one;
  }
};

}  // namespace orthonorm::gemm
