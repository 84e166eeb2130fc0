// One element of `adamw_step_`; torch-free.
#pragma once

#include <cmath>

#include "mantissa.h"

namespace orthonorm {

// What the whole list shares.
struct AdamWRule {
  double lr, beta1, beta2, eps, weight_decay;
  bool decay_first, correct_eps;
  double grad_scale = 1;
};

// What is constant over one parameter. Made in double, converted once to its arithmetic.
template <class A>
struct AdamWStep {
  A decay, size, eps, beta1, gain1, beta2, gain2, unscale;

  // `t` counts this step too. Decaying last multiplies the update by the decay as well, so both
  // orders are decay * w - size * m / denominator.
  ORTHONORM_HD AdamWStep(const AdamWRule& rule, double t) {
    const double kept = 1 - rule.lr * rule.weight_decay;
    const double correct1 = 1 - std::pow(rule.beta1, t);
    const double correct2 = std::sqrt(1 - std::pow(rule.beta2, t));
    const double step = rule.lr * correct2 / correct1;
    decay = static_cast<A>(kept);
    size = static_cast<A>(rule.decay_first ? step : step * kept);
    eps = static_cast<A>(rule.correct_eps ? rule.eps * correct2 : rule.eps);
    beta1 = static_cast<A>(rule.beta1);
    gain1 = static_cast<A>(1 - rule.beta1);
    beta2 = static_cast<A>(rule.beta2);
    gain2 = static_cast<A>(1 - rule.beta2);
    unscale = static_cast<A>(1 / rule.grad_scale);
  }

  template <class B>
  ORTHONORM_HD explicit AdamWStep(const AdamWStep<B>& c)
      : decay(static_cast<A>(c.decay)),
        size(static_cast<A>(c.size)),
        eps(static_cast<A>(c.eps)),
        beta1(static_cast<A>(c.beta1)),
        gain1(static_cast<A>(c.gain1)),
        beta2(static_cast<A>(c.beta2)),
        gain2(static_cast<A>(c.gain2)),
        unscale(static_cast<A>(c.unscale)) {}
};

// With x = g / grad_scale: m <- beta1 m + (1-beta1) x, v <- beta2 v + (1-beta2) x^2,
// w <- decay w - size m / (sqrt(v) + eps); no update where that denominator is 0.
template <class A>
ORTHONORM_HD inline void adamw_step(const AdamWStep<A>& c, A& w, A g, A& m, A& v) {
  const A x = c.unscale * g;
  m = std::fma(c.beta1, m, c.gain1 * x);
  v = std::fma(c.beta2, v, c.gain2 * x * x);
  const A denominator = std::sqrt(v) + c.eps;
  const A direction = m / denominator;
  w = std::fma(-c.size, denominator == A(0) ? A(0) : direction, c.decay * w);
}

// The same of the float that `w` and `mantissa` are the halves of.
template <class A>
ORTHONORM_HD inline void adamw_step(const AdamWStep<A>& c, A& w, A g, A& m, A& v, A& mantissa) {
  A whole = static_cast<A>(joined(w, mantissa));
  adamw_step(c, whole, g, m, v);
  split(static_cast<float>(whole), w, mantissa);
}

}  // namespace orthonorm
