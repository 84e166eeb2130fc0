// The arithmetic of power iteration on one matrix: half steps, their divisors, sigma; torch-free.
//
// W is seen with rows that are short-strided in memory: "left" has one number per row, "right" one
// per column, whichever of u and v that makes them. A vector is an array and a factor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

namespace orthonorm::power {

// What one pass over W computes.
enum class Sweep {
  product,  // left = W right
  adjoint,  // right = W^T left
  both,     // left = W right and W^T of it, each row being used twice while it is in cache
  peak,     // the largest magnitude
  quotient, // W / sigma, written elsewhere
  done,
};

struct Rule {
  int64_t steps;
  bool left_first;  // a step is product, then adjoint
  double eps;       // lower clamp of norms
};

// x -> 2^-exponent x, in two exact steps because 2^-exponent itself may overflow.
template <class A>
struct Shift {
  A half, rest;

  ORTHONORM_HD explicit Shift(int exponent)
      : half(static_cast<A>(std::ldexp(1.0, -(exponent / 2)))),
        rest(static_cast<A>(std::ldexp(1.0, -(exponent - exponent / 2)))) {}
  ORTHONORM_HD A operator()(A x) const { return x * half * rest; }
};

struct Half {
  double factor, estimate;
};

// The new vector is raw * factor, raw = W operand without the operand's factor; the estimate is the
// new vector's product with W operand. `sum` = |raw|^2 > 0.
ORTHONORM_HD inline Half half_step(double sum, double operand_factor, double eps) {
  const double length = std::sqrt(sum), least = eps / operand_factor;
  const double divisor = length > least ? length : least;
  return {1 / divisor, sum / divisor * operand_factor};
}

// Whether a product of W of this |product|^2 kept all its bits: `factors` times W times a unit
// vector in arithmetic A. Beyond these bounds elements far smaller than the norm may have been
// rounded as subnormals, or squares may overflow; then W is brought near 1 and swept again.
template <class A>
ORTHONORM_HD inline bool comfortable(double sum, int factors) {
  const double bound = sizeof(A) == 8 ? 0x1p200 : 0x1p40;
  const double high = factors == 2 ? bound * bound : bound;
  return sum >= 1 / (high * high) && sum <= high * high;  // false for NaN
}

// How far the iteration on one matrix has come.
//
// W enters as 2^-exponent W: 0 first, and for matrices that leave the comfortable range, or have a
// zero or non-finite product, the exponent of the largest entry. All of it is exact, so the two
// ways give the same bits where both are possible.
class Progress {
 public:
  Progress() = default;
  explicit Progress(const Rule& rule) : rule_(rule) {}

  double left_factor = 1, right_factor = 1;
  bool left_new = false, right_new = false;

  bool rescaled() const { return rescaled_; }
  int exponent() const { return exponent_; }
  bool evaluates() const { return rule_.steps == 0; }

  Sweep next() const {
    if (half_ == std::max<int64_t>(2 * rule_.steps, 1)) return Sweep::done;
    if (evaluates()) return Sweep::product;
    const bool product = (half_ % 2 == 0) == rule_.left_first;
    if (!product) return Sweep::adjoint;
    return !rescaled_ && half_ + 1 < 2 * rule_.steps ? Sweep::both : Sweep::product;
  }

  // Starts again on 2^-exponent W.
  void rescale(int exponent) {
    *this = Progress(rule_);
    rescaled_ = true;
    exponent_ = exponent;
  }

  // Ends here, with both vectors as they were at the start.
  void stop(double sigma) {
    left_new = right_new = false;
    estimate_ = sigma;
    exponent_ = 0;
    half_ = std::max<int64_t>(2 * rule_.steps, 1);
  }

  // After left = W right of this |raw left|^2; false: it is zero and the old vector stays.
  bool product(double sum) { return advance(sum, right_factor, left_factor, left_new); }

  // After right = W^T left.
  bool adjoint(double sum) { return advance(sum, left_factor, right_factor, right_new); }

  // After the product of an iteration of no steps: `dot` = left . raw.
  void evaluate(double dot) {
    estimate_ = dot * left_factor * right_factor;
    ++half_;
  }

  double sigma() const { return std::ldexp(estimate_, exponent_); }

 private:
  bool advance(double sum, double operand_factor, double& factor, bool& is_new) {
    if (half_++ % 2 == 0) estimate_ = 0;
    if (sum == 0) return false;
    const double largest = std::numeric_limits<double>::max();
    const double eps = std::min(std::ldexp(rule_.eps, -exponent_), largest);
    const Half half = half_step(sum, operand_factor, eps);
    factor = half.factor;
    estimate_ = half.estimate;
    is_new = true;
    return true;
  }

  Rule rule_{};
  int64_t half_ = 0;  // half steps taken
  bool rescaled_ = false;
  int exponent_ = 0;
  double estimate_ = 0;
};

}  // namespace orthonorm::power
