// Rows over a number: each element type and stride, in exactly the memory that the strides need.
//
//   g++ -std=c++20 -O2 -Icsrc csrc/tests/test_power_quotient.cpp && ./a.out
#include "power_quotient.h"
#include "tests/check.h"
#include "tests/stored.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

using namespace orthonorm;
using namespace orthonorm::power;

namespace {

// Bits of its numbers, and the exponent of the least.
template <class T>
struct Type;
template <>
struct Type<double> {
  static constexpr int bits = 53, least = -1074;
};
template <>
struct Type<float> {
  static constexpr int bits = 24, least = -149;
};
template <>
struct Type<Bf16> {
  static constexpr int bits = 8, least = -133;
};
template <>
struct Type<Fp16> {
  static constexpr int bits = 11, least = -24;
};

// Half a unit in the last place of T at x; a hair more for the product with the inverse in double.
template <class T>
double half_unit(double x) {
  const int exponent = x == 0 ? Type<T>::least : std::ilogb(x) - Type<T>::bits + 1;
  return std::ldexp(0.5 + 1e-6, std::max(exponent, Type<T>::least));
}

template <class T>
void test_rows(std::mt19937& random) {
  const bool half = sizeof(T) == 2;
  for (const int64_t rows : {1, 3, 8}) {
    for (const int64_t cols : {1, 7, 16, 33}) {
      for (const int64_t in : {1, 2}) {
        for (const int64_t out : {1, 3}) {
          const Stored<T> w(rows, cols, in * cols + 2, in, random, half ? 1.0 : 1e3);
          Stored<T> q(rows, cols, out * cols + 1, out);
          narrow(7.0f, q.memory.front());
          const auto before = q.memory;
          for (const double divisor : {3.7, 1e-3, 1.0, half ? 250.0 : 1e30}) {
            divide_rows(w.source(), q.target(), 0, 1, cols, divisor);  // in two calls
            if (rows > 1) divide_rows(w.source(), q.target(), 1, rows - 1, cols, divisor);
            for (int64_t i = 0; i < rows; ++i) {
              for (int64_t j = 0; j < cols; ++j) {
                const double want = w.at(i, j) / divisor, got = q.at(i, j);
                CHECK(std::fabs(got - want) <= half_unit<T>(want), "%g, not %g", got, want);
              }
            }
          }
          for (size_t k = 0; k < before.size(); ++k) {
            const auto row = static_cast<int64_t>(k) / q.row_stride;
            const auto rest = static_cast<int64_t>(k) - row * q.row_stride;
            const bool between = rest % out != 0 || rest / out >= cols;
            CHECK(!between || q.number(q.memory[k]) == q.number(before[k]), "between, %zu", k);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  test_rows<float>(random);
  test_rows<double>(random);
  test_rows<Bf16>(random);
  test_rows<Fp16>(random);
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
