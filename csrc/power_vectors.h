// What power iteration does with vectors between sweeps; torch-free.
#pragma once

#include <limits>

#include "power_rows.h"

namespace orthonorm::power {

// |x|^2 in double, the same for any instruction set but for fused products.
template <class A>
double square_sum(const A* x, int64_t count) {
  constexpr int64_t L = 16;
  double lanes[L] = {};
  specialized([&] {
    int64_t i = 0;
    for (; i + L <= count; i += L) {
      for (int64_t l = 0; l < L; ++l) {
        const double value = x[i + l];
        lanes[l] += value * value;
      }
    }
    for (; i < count; ++i) lanes[0] += static_cast<double>(x[i]) * x[i];
  });
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <class A>
double dot(const A* x, const A* y, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * y[i];
  return sum;
}

// to = factor from, rounded once.
template <class A>
void scale(const A* from, double factor, int64_t count, A* to) {
  specialized([=] {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(from[i] * factor);
  });
}

// Adds `blocks` arrays of `count` numbers, `stride` apart, in double and in their order.
template <class A>
void add_blocks(const A* from, int64_t blocks, int64_t stride, int64_t count, A* to) {
  constexpr int64_t TILE = 256;
  double sums[TILE];
  specialized([&] {
    for (int64_t start = 0; start < count; start += TILE) {
      const int64_t n = std::min(TILE, count - start);
      for (int64_t j = 0; j < n; ++j) sums[j] = from[start + j];
      for (int64_t b = 1; b < blocks; ++b) {
        const A* block = from + b * stride + start;
        for (int64_t j = 0; j < n; ++j) sums[j] += block[j];
      }
      for (int64_t j = 0; j < n; ++j) to[start + j] = static_cast<A>(sums[j]);
    }
  });
}

// The largest magnitude; infinity if anything is not finite.
template <class A>
double peak(const A* x, int64_t count) {
  using Bits = Mask<A>;  // magnitudes are ordered like their bits, non-finite ones above all
  constexpr Bits SIGN = Bits{1} << (8 * sizeof(A) - 1);
  Bits largest = 0;
  specialized([&] {
    for (int64_t i = 0; i < count; ++i) {
      Bits bits;
      std::memcpy(&bits, x + i, sizeof bits);
      largest = std::max(largest, static_cast<Bits>(bits & ~SIGN));
    }
  });
  const A value = bit_cast<A>(largest);
  return std::isfinite(value) ? value : std::numeric_limits<double>::infinity();
}

// The largest magnitude of rows [first, first + rows); `scratch` as in Block.
template <class A>
double peak_of_rows(const Source& s, int64_t first, int64_t rows, int64_t cols, A* scratch) {
  double largest = 0;
  for (int64_t i = 0; i < rows; i += GROUP) {
    const int64_t n = std::min(GROUP, rows - i);
    copy_rows(s, first + i, n, cols, scratch);
    largest = std::max(largest, peak(scratch, n * width<A>(cols)));
  }
  return largest;
}

// x <- 2^-exponent x with its largest magnitude in [1, 2); returns 2^exponent. Vectors of zeros and
// those that are not finite stay as they are.
template <class A>
double bring_near_one(A* x, int64_t count) {
  const double largest = peak(x, count);
  if (largest == 0 || !std::isfinite(largest)) return 1;
  const int exponent = std::ilogb(largest);
  const Shift<A> shift(exponent);
  for (int64_t i = 0; i < count; ++i) x[i] = shift(x[i]);
  return std::ldexp(1.0, exponent);
}

}  // namespace orthonorm::power
