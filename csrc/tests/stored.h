// Matrices for tests of sweeps: any element type and strides, in exactly as much memory as these
// need, so that AddressSanitizer sees a read beyond the last element.
#pragma once

#include <cstdint>
#include <random>
#include <type_traits>
#include <vector>

#include "power_quotient.h"

namespace orthonorm::power {

template <class T>
constexpr Element element_of() {
  if (std::is_same_v<T, double>) return Element::f64;
  if (std::is_same_v<T, float>) return Element::f32;
  return std::is_same_v<T, Bf16> ? Element::bf16 : Element::f16;
}

template <class T>
using Sums = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct Stored {
  int64_t rows, cols, row_stride, col_stride;
  std::vector<T> memory;

  Stored(int64_t r, int64_t c, int64_t rs, int64_t cs)
      : rows(r), cols(c), row_stride(rs), col_stride(cs), memory((r - 1) * rs + (c - 1) * cs + 1) {}
  Stored(int64_t r, int64_t c, int64_t rs, int64_t cs, std::mt19937& random, double scale = 1)
      : Stored(r, c, rs, cs) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < c; ++j) {
        narrow(static_cast<Sums<T>>(normal(random) * scale), memory[i * rs + j * cs]);
      }
    }
  }
  double at(int64_t i, int64_t j) const { return number(memory[i * row_stride + j * col_stride]); }
  static double number(const T& x) { return static_cast<double>(widen(x)); }
  Source source() const { return {memory.data(), element_of<T>(), row_stride, col_stride, 0}; }
  Target target() { return {memory.data(), row_stride, col_stride}; }
};

}  // namespace orthonorm::power
