// The formulas of the passes over lists of tensors, in float against double and in double against
// long double: at most the roundings they are made of, counted on the side of caution.
//
//   g++ -std=c++20 -O2 -Icsrc csrc/tests/test_formulas.cpp && ./a.out
//
// ORTHONORM_ISA chooses the instruction set of the loops.
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "adamw_step.h"
#include "cpu/isa.h"
#include "decayed_update.h"
#include "elementwise_moment.h"
#include "magnitude.h"
#include "muon_prologue.h"
#include "rotated_adam.h"
#include "sinh_square.h"
#include "tests/check.h"

using namespace orthonorm;

namespace {

template <class A>
constexpr A unit = std::numeric_limits<A>::epsilon() / 2;  // of one rounding
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr int trials = 2000;

struct Random {
  std::mt19937 engine;
  std::normal_distribution<double> normal;

  explicit Random(int seed) : engine(seed) {}
  double operator()() { return normal(engine); }
};

// `count` roundings, each of the size of `terms`.
template <class A, class W>
void near(A got, W exact, W terms, int count, const char* what) {
  const W error = std::fabs(static_cast<W>(got) - exact);
  CHECK(error <= count * static_cast<W>(unit<A>) * terms, "%s: %g instead of %g", what,
        static_cast<double>(got), static_cast<double>(exact));
}

template <class A, class W>
void test_rotated_adam(double scale_of_data, double eps) {
  Random random(1);
  const RotatedAdam<A> c(0.9, 0.99, eps, 0.7);
  const RotatedAdam<W> exact(0.9, 0.99, eps, 0.7);
  for (int trial = 0; trial < trials; ++trial) {
    A m = static_cast<A>(random() * scale_of_data), x = static_cast<A>(random() * scale_of_data);
    A v = static_cast<A>(std::pow(random() * scale_of_data, 2));
    W M = m, V = v, X = x;
    const W terms = std::fabs(W(0.9) * M) + std::fabs(W(0.1) * X);
    rotated_adam(c, m, v, x);
    rotated_adam(exact, M, V, X);
    near(m, M, terms, 5, "rotated_adam m");
    near(v, V, V, 5, "rotated_adam v");
    near(x, X, W(0.7) * terms / (std::sqrt(V) + W(eps)), 16, "rotated_adam x");
  }
}

template <class A, class W>
void test_elementwise_moment(double scale_of_data, double eps) {
  Random random(5);
  const ElementwiseMoment<A> c(0.99, eps, 7.1);
  const ElementwiseMoment<W> exact(0.99, eps, 7.1);
  for (int trial = 0; trial < trials; ++trial) {
    A x = static_cast<A>(random() * scale_of_data);
    A v = static_cast<A>(std::pow(random() * scale_of_data, 2));
    W V = v, X = x;
    elementwise_moment(c, v, x);
    elementwise_moment(exact, V, X);
    near(v, V, V, 5, "elementwise_moment v");
    near(x, X, std::fabs(X), 8, "elementwise_moment x");
  }
}

template <class A, class W>
void test_adamw_step(bool decay_first, bool correct_eps) {
  Random random(2);
  const AdamWRule rule{0.01, 0.9, 0.99, 1e-6, 0.3, decay_first, correct_eps};
  for (int trial = 0; trial < trials; ++trial) {
    const AdamWStep<W> exact(rule, 1 + trial % 50);
    const AdamWStep<A> c(exact);
    A w = static_cast<A>(random()), g = static_cast<A>(random()), m = static_cast<A>(random());
    A v = static_cast<A>(std::pow(random(), 2));
    W W_ = w, M = m, V = v;
    const W terms = std::fabs(exact.beta1 * M) + std::fabs(exact.gain1 * g);
    adamw_step(c, w, g, m, v);
    adamw_step<W>(exact, W_, g, M, V);
    near(m, M, terms, 5, "adamw_step m");
    near(v, V, V, 5, "adamw_step v");
    const W step = exact.size * terms / (std::sqrt(V) + exact.eps);
    near(w, W_, std::fabs(exact.decay * W_) + 2 * step, 16, "adamw_step w");
  }
}

// The two orders of decay and the two places of eps, from their definition.
void test_adamw_rules() {
  const double w = 2, g = 0.5, m = 0.25, v = 0.0625, lr = 0.1, wd = 0.5, eps = 0.01, t = 3;
  for (const bool decay_first : {true, false}) {
    for (const bool correct_eps : {true, false}) {
      const AdamWRule rule{lr, 0.9, 0.99, eps, wd, decay_first, correct_eps};
      double got = w, new_m = m, new_v = v;
      adamw_step(AdamWStep<double>(rule, t), got, g, new_m, new_v);
      const double correct1 = 1 - std::pow(0.9, t), correct2 = std::sqrt(1 - std::pow(0.99, t));
      const double root = std::sqrt(new_v);
      const double update = correct_eps ? lr * (new_m / correct1) / (root / correct2 + eps)
                                        : lr * correct2 / correct1 * new_m / (root + eps);
      const double wanted = decay_first ? (1 - lr * wd) * w - update : (1 - lr * wd) * (w - update);
      CHECK(std::fabs(got - wanted) < 1e-15, "%g instead of %g", got, wanted);
    }
  }
}

template <class A, class W>
void test_decayed_update() {
  Random random(3);
  const DecayedUpdate<A> c(0.02, 0.3, 1.7);
  const DecayedUpdate<W> exact(0.02, 0.3, 1.7);
  for (int trial = 0; trial < trials; ++trial) {
    A w = static_cast<A>(random());
    const A u = static_cast<A>(random());
    W W_ = w;
    const W terms = std::fabs(exact.decay * W_) + std::fabs(exact.step * u);
    decayed_update(c, w, u);
    decayed_update<W>(exact, W_, u);
    near(w, W_, terms, 4, "decayed_update");
  }
}

template <class A, class W>
void test_muon_prologue(bool nesterov) {
  Random random(4);
  for (int trial = 0; trial < trials; ++trial) {
    const A g = static_cast<A>(random());
    A b = static_cast<A>(random());
    W B = b;
    const W terms = std::fabs(B) + std::fabs(static_cast<W>(g));
    const A u = muon_prologue(MuonPrologue<A>(0.95, nesterov), g, b);
    const W U = muon_prologue(MuonPrologue<W>(0.95, nesterov), static_cast<W>(g), B);
    near(b, B, terms, 4, "muon_prologue b");
    near(u, U, terms, 8, "muon_prologue u");
    CHECK(nesterov || u == b, "without Nesterov the update is the average");
  }
}

void test_zero_over_zero() {
  float m = 0, v = 0, x = 0, w = 3;
  rotated_adam(RotatedAdam<float>(0.9, 0.99, 0, 1), m, v, x);
  CHECK(x == 0, "rotated_adam: %g", x);
  elementwise_moment(ElementwiseMoment<float>(0.99, 0, 1), v, x);
  CHECK(x == 0, "elementwise_moment: %g", x);
  const AdamWRule rule{0.1, 0.9, 0.99, 0, 0, true, true};
  adamw_step(AdamWStep<float>(rule, 1), w, 0.0f, m, v);
  CHECK(w == 3, "adamw_step: %g", w);
  const float nan = std::nanf("");
  adamw_step(AdamWStep<float>(rule, 1), w, nan, m, v);
  CHECK(std::isnan(w) && std::isnan(m) && std::isnan(v), "a NaN must not pass for a zero");
}

// A loop of any length gives every element the bits it has alone.
template <class A>
void test_places() {
  Random random(5);
  const AdamWRule rule{0.01, 0.9, 0.99, 1e-6, 0.3, true, true};
  const AdamWStep<A> c(rule, 3);
  for (int64_t n = 0; n < 70; ++n) {
    std::vector<A> w(n), g(n), m(n), v(n);
    for (auto* values : {&w, &g, &m, &v}) {
      for (A& value : *values) value = static_cast<A>(random());
    }
    for (A& value : v) value *= value;
    std::vector<A> W = w, M = m, V = v;
    A *pw = w.data(), *pg = g.data(), *pm = m.data(), *pv = v.data();
    specialized([=] {
      for (int64_t i = 0; i < n; ++i) adamw_step(c, pw[i], pg[i], pm[i], pv[i]);
    });
    for (int64_t i = 0; i < n; ++i) {
      adamw_step(c, W[i], g[i], M[i], V[i]);
      CHECK(w[i] == W[i] && m[i] == M[i] && v[i] == V[i], "element %d of %d", int(i), int(n));
    }
  }
}

template <class A>
SquareSum sum_of(const std::vector<A>& x) {
  SquareSum sum;
  specialized([&] { sum = square_sum(x.data(), static_cast<int64_t>(x.size())); });
  return sum;
}

template <class A>
void test_square_sum() {
  Random random(6);
  constexpr bool wide = sizeof(A) == 8;
  for (int n = 0; n < 300; ++n) {
    std::vector<A> x(n);
    long double exact = 0;
    for (A& value : x) {
      value = static_cast<A>(random());
      exact += static_cast<long double>(value) * value;
    }
    const double norm = sum_of(x).norm();
    near(norm, std::sqrt(exact), std::sqrt(exact), n / 64 + 8, "square_sum");
    for (const int k : {-60, 17, wide ? 1000 : 100, wide ? -1000 : -100}) {
      std::vector<A> scaled = x;
      for (A& value : scaled) value = std::ldexp(value, k);
      CHECK(sum_of(scaled).norm() == std::ldexp(norm, k), "2^%d of %d", k, n);
    }
    if (n == 0) continue;
    for (const double bad : {inf, -inf, std::nan("")}) {
      std::vector<A> broken = x;
      broken[n / 2] = static_cast<A>(bad);
      CHECK(!std::isfinite(sum_of(broken).norm()), "%g among %d", bad, n);
    }
  }
}

void test_merging() {
  const std::vector<double> small{3e-200, 4e-200}, large{3e200, 4e200}, zero{0, 0}, tiny{5e-324};
  const SquareSum a = sum_of(small), b = sum_of(large), z = sum_of(zero), t = sum_of(tiny);
  near((a + a).norm(), std::sqrt(2.0) * 5e-200, 5e-200, 4, "two small");
  near((a + b).norm(), 5e200, 5e200, 4, "small and large");
  CHECK((a + z).norm() == a.norm() && (z + a).norm() == a.norm(), "zero changes nothing");
  CHECK((SquareSum() + a).norm() == a.norm(), "nothing changes nothing");
  CHECK(t.norm() == 5e-324 && (z + z).norm() == 0, "the smallest and none");
  CHECK((a + b).norm() == (b + a).norm(), "order of two");
  CHECK(!std::isfinite((sum_of(std::vector<double>{inf}) + a).norm()), "infinity stays");
}

// Against sinh in long double: within the series, beyond it, and where d is no divisor.
template <class A>
void test_sinh_squares() {
  Random random(17);
  for (const double largest : {1e-20, 0.03, 0.37, 3.0, 300.0}) {
    A x[100];
    for (A& value : x) value = static_cast<A>(random() * largest);
    for (const double d : {0.9, -1.0, 0x1p-1010, inf, 0.0}) {
      long double want = 0;
      for (const A value : x) {
        const long double s = d == 0 ? 0.0L : std::sinh(static_cast<long double>(value) / d);
        want += s * s;
      }
      const double got = sum_of_sinh_squares(x, d, 100);
      const double most = static_cast<double>(want);
      CHECK(got == most || std::abs(got - most) <= (8 + 2 * largest / std::abs(d)) * 0x1p-52 * most,
            "%g instead of %g for %g", got, most, largest / d);
    }
  }
  A bad[3] = {0, std::numeric_limits<A>::quiet_NaN(), 0};
  CHECK(std::isnan(sum_of_sinh_squares(bad, 1.0, 3)), "NaN is lost");
}

}  // namespace

int main() {
  for (const double eps : {1e-8, 0.0, 0.1}) {
    for (const double scale : {1.0, 1e-6, 1e6}) {
      test_rotated_adam<float, double>(scale, eps);
      test_rotated_adam<double, long double>(scale, eps);
      test_elementwise_moment<float, double>(scale, eps);
      test_elementwise_moment<double, long double>(scale, eps);
    }
  }
  for (const bool first : {true, false}) {
    for (const bool second : {true, false}) {
      test_adamw_step<float, double>(first, second);
      test_adamw_step<double, long double>(first, second);
    }
    test_muon_prologue<float, double>(first);
    test_muon_prologue<double, long double>(first);
  }
  test_adamw_rules();
  test_decayed_update<float, double>();
  test_decayed_update<double, long double>();
  test_zero_over_zero();
  test_places<float>();
  test_places<double>();
  test_square_sum<float>();
  test_square_sum<double>();
  test_merging();
  test_sinh_squares<float>();
  test_sinh_squares<double>();
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
