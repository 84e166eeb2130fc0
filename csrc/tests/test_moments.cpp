// The rules and loops behind row, column and factored moments and norms, against long double.
//
//   g++ -std=c++20 -O2 -Icsrc csrc/tests/test_moments.cpp && ./a.out
//
// ORTHONORM_ISA chooses the instruction set. Buffers are as long as they need to be, so that
// AddressSanitizer sees a read or write beyond them.
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cpu/moment_loops.h"
#include "cpu/short_sums.h"
#include "tests/check.h"

using namespace orthonorm;

namespace {

using Real = long double;

constexpr double inf = std::numeric_limits<double>::infinity();
const double nan = std::nan("");
constexpr EpsAt PLACES[] = {EpsAt::outside, EpsAt::inside, EpsAt::clamp};

template <class A>
std::unique_ptr<A[]> random_values(int64_t count, double scale, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  auto values = std::make_unique<A[]>(count);
  using Wide = std::conditional_t<std::is_same_v<A, double>, double, float>;
  for (int64_t i = 0; i < count; ++i) narrow(static_cast<Wide>(scale * normal(random)), values[i]);
  return values;
}

// The distance from `got` to the exact value, in halves of A's spacing there: at most 1 if `got` is
// the exact value rounded once.
template <class A>
Real roundings(A got, Real exact) {
  const A near = static_cast<A>(exact);
  const A next = std::nextafter(near, std::numeric_limits<A>::infinity());
  return std::fabs(static_cast<Real>(got) - exact) / ((static_cast<Real>(next) - near) / 2);
}

void test_rules() {
  CHECK(inverse_or_zero(0) == 0, "zero");
  CHECK(inverse_or_zero(4) == 0.25, "four");
  CHECK(0 * inverse_or_zero(1e-310) == 0, "a denormal's inverse must be finite");
  CHECK(inverse_or_zero(inf) == 0, "infinity");
  CHECK(std::isnan(inverse_or_zero(nan)), "NaN");
  CHECK(denominator(4, 0.5, EpsAt::outside) == 2.5, "outside");
  CHECK(denominator(4, 5, EpsAt::inside) == 3, "inside");
  CHECK(denominator(4, 3, EpsAt::clamp) == 3, "clamp from below");
  CHECK(denominator(4, 1, EpsAt::clamp) == 2, "clamp not touching");
  CHECK(divisor(3, 16, EpsAt::inside) == 5, "3-4-5");
  CHECK(divisor(3, 1, EpsAt::outside) == 4 && divisor(3, 4, EpsAt::clamp) == 4, "divisors");
  CHECK(std::fabs(divisor(1e300, 1, EpsAt::inside) / 1e300 - 1) < 1e-15, "no overflow inside");
  for (const EpsAt at : PLACES) {
    CHECK(std::isnan(denominator(nan, 1, at)) && std::isnan(divisor(nan, 1, at)), "NaN stays");
  }
  CHECK(decayed(2, 6, 0.75) == 3, "decay");
  CHECK(norm_ratio(9, 4) == 1.5 && norm_ratio(9, 0) == 0 && norm_ratio(0, 0) == 0, "ratio");
  CHECK(std::fabs(norm_ratio(1e300, 1e-300) / 1e300 - 1) < 1e-15,
        "the quotient of squares would overflow");
}

// The polynomial's promise, from small t to the largest it is used for.
void test_near_factor() {
  for (const EpsAt at : {EpsAt::outside, EpsAt::inside}) {
    const NearFactor near(at);
    for (double t = 0x1p-30; t < 0x1p-8; t *= 1.7) {
      const Real s = t, base = 1 + s, slack = 8 * std::numeric_limits<Real>::epsilon();
      const Real f = at == EpsAt::outside ? 1 / base : 1 / std::sqrt(base);
      const Real p = 1 + s * (near.linear + near.quadratic * s);
      CHECK(std::fabs(f - p) <= s * s * s + slack, "t = %g", t);
      const Real square = 1 - near.norm_linear * s;
      CHECK(std::fabs(f * f - square) <= 1.5L * near.norm_linear * s * s + slack, "t = %g", t);
    }
  }
}

void test_sums(int64_t count, double scale) {
  const auto x = random_values<float>(count, scale, 1);
  Real exact = 0;
  for (int64_t i = 0; i < count; ++i) exact += static_cast<Real>(x[i]) * x[i];
  const double sum = sum_squares(Rows<1, float>{{x.get()}}, count);
  CHECK(std::fabs(sum - exact) <= 1e-14L * exact, "%d at %g", static_cast<int>(count), scale);
  const auto wide = random_values<double>(count, scale, 1);
  exact = 0;
  for (int64_t i = 0; i < count; ++i) exact += static_cast<Real>(wide[i]) * wide[i];
  const double norm = sum_squares(Rows<1, double>{{wide.get()}}, count).norm();
  CHECK(std::fabs(norm - std::sqrt(exact)) <= 1e-14L * norm, "%d at %g", static_cast<int>(count),
        scale);
}

// The same numbers whether stored in 16 bits or widened to float.
template <class T>
void test_formats(int64_t count) {
  const auto wide = random_values<float>(count, 2, 4);
  auto narrowed = std::make_unique<T[]>(count), y = std::make_unique<T[]>(count);
  auto widened = std::make_unique<float[]>(count), z = std::make_unique<float[]>(count);
  for (int64_t i = 0; i < count; ++i) {
    narrow(wide[i], narrowed[i]);
    widened[i] = widen(narrowed[i]);
  }
  const Rows<1, T> rows{{narrowed.get()}, 64};
  const Rows<1, float> float_rows{{widened.get()}};
  CHECK(sum_squares(rows, count) == sum_squares(float_rows, count), "%d", static_cast<int>(count));
  auto sums = std::make_unique<double[]>(count), same = std::make_unique<double[]>(count);
  add_squares(rows, count, sums.get());
  add_squares(float_rows, count, same.get());
  CHECK(std::equal(sums.get(), sums.get() + count, same.get()), "%d", static_cast<int>(count));
  scale(narrowed.get(), Split(0.3), count, y.get());
  scale(widened.get(), Split(0.3), count, z.get());
  for (int64_t i = 0; i < count; ++i) {
    T once;
    narrow(z[i], once);
    CHECK(y[i].bits == once.bits, "%d of %d", static_cast<int>(i), static_cast<int>(count));
  }
}

// Plain and weighted sums over runs of any size: float's error where float holds them, double's
// where it does not (scales, weights, a run or a column of another size or of zeros).
template <int R, class A>
void test_columns(int64_t count, double scale, double weight, bool spoilt = false,
                  bool exactly = false) {
  std::unique_ptr<A[]> memory[R];
  Rows<R, A> x;
  Weights<R> weights;
  auto sums = random_values<double>(count, 0, 9), a = random_values<double>(count, 0, 9);
  auto b = random_values<double>(count, 0, 9), c = random_values<double>(count, 0, 9);
  for (int r = 0; r < R; ++r) {
    memory[r] = random_values<A>(count, r == 3 ? 1e-6 * scale : scale, r);
    for (int64_t j = 0; spoilt && scale < 1 && j < count; j += 100) memory[r][j] = A{};
    for (int64_t j = 1; spoilt && r != 5 && j < count; j += 100) memory[r][j] = A{};
    for (int64_t j = 300; j < count; j += 1000) memory[r][j] = A{};  // the tile is added in double
    x.at[r] = memory[r].get();
    weights.first[r] = (spoilt && r == 5 ? 1e-40 : 1 + r) * weight;
    weights.second[r] = 0.1 * (1 + r);
    add_squares(Rows<1, A>{{x.at[r]}, 64}, count, sums.get());
  }
  add_weighted_squares(x, weights, count, {a.get(), b.get(), c.get()}, exactly);
  // A weight, a square, their product and the sums of R of them are rounded.
  const Real allowed = sizeof(A) <= 4 && !exactly ? (R + 2) * 0x1p-24L : 1e-14L;
  for (int64_t j = 0; j < count; ++j) {
    Real exact[3] = {};
    for (int r = 0; r < R; ++r) {
      const Real square = static_cast<Real>(widen(x.at[r][j])) * widen(x.at[r][j]);
      exact[0] += square;
      exact[1] += weights.first[r] * square;
      exact[2] += weights.second[r] * square;
    }
    const int at = static_cast<int>(j);
    CHECK(std::fabs(sums[j] - exact[0]) <= 1e-15L * exact[0], "column %d at %g", at, scale);
    CHECK(std::fabs(a[j] - exact[0]) <= allowed * exact[0], "column %d at %g", at, scale);
    CHECK(std::fabs(b[j] - exact[1]) <= allowed * exact[1], "column %d at %g", at, scale);
    CHECK(std::fabs(c[j] - exact[2]) <= allowed * exact[2], "column %d at %g", at, scale);
  }
}

void test_splits() {
  for (const double factor : {0.0, 1.0 / 3, -1e-30, 7e37, 0x1p-100}) {
    const Split s(factor);
    CHECK(Split::fits(factor), "%g", factor);
    const Real error = std::fabs((static_cast<Real>(s.high) + s.low) - factor);
    CHECK(error <= 0x1p-48L * std::fabs(factor), "%g", factor);
  }
  for (const double factor : {0x1p-101, 1e39, inf, nan}) CHECK(!Split::fits(factor), "%g", factor);
}

// A product is rounded once, with a Split as with a double; in place gives the same bits.
template <class F, class A, class Factors>
void test_scaling(const F& factor, const Factors& factors, const A* x, int64_t count) {
  auto y = std::make_unique<A[]>(count), z = std::make_unique<A[]>(count);
  auto w = std::make_unique<A[]>(count);
  scale(x, factor, count, y.get());
  scale_each(x, factors, count, z.get());
  const auto exact = [](const auto& f) {
    if constexpr (sizeof(f) == 8 && std::is_class_v<F>) return static_cast<Real>(f.high) + f.low;
    else return static_cast<Real>(f);
  };
  for (int64_t i = 0; i < count; ++i) {
    CHECK(roundings(y[i], x[i] * exact(factor)) <= 1.0000001L, "scale");
    CHECK(roundings(z[i], x[i] * exact(factors[i])) <= 1.0000001L, "scale_each");
  }
  std::copy(x, x + count, w.get());
  const Ahead ahead{reinterpret_cast<const char*>(x), sizeof(A)};
  scale(w.get(), factor, count, w.get(), ahead);
  CHECK(std::equal(w.get(), w.get() + count, y.get()), "in place, with prefetch");
  std::copy(x, x + count, w.get());
  scale_each(w.get(), factors, count, w.get());
  CHECK(std::equal(w.get(), w.get() + count, z.get()), "in place");
}

void test_scaling(int64_t count) {
  const auto x = random_values<float>(count, 2, 3);
  const auto wide = random_values<double>(count, 2, 3),
             factors = random_values<double>(count, 5, 4);
  auto high = std::make_unique<float[]>(count), low = std::make_unique<float[]>(count);
  for (int64_t i = 0; i < count; ++i) {
    const Split split(factors[i]);
    high[i] = split.high, low[i] = split.low;
  }
  const double* by = factors.get();
  test_scaling(1.0 / 3, by, x.get(), count);
  test_scaling(1.0 / 3, by, wide.get(), count);
  test_scaling(Split(1.0 / 3), Splits{high.get(), low.get()}, x.get(), count);
}

void test_division(int64_t count) {
  const auto x = random_values<double>(count, 2, 5);
  auto by = random_values<double>(count, 2, 6), y = std::make_unique<double[]>(count);
  for (int64_t i = 0; i < count; i += 3) by[i] = 0;
  divide_each(x.get(), by.get(), count, y.get());
  for (int64_t i = 0; i < count; ++i) CHECK(y[i] == (by[i] == 0 ? 0 : x[i] / by[i]), "each");
  divide(x.get(), 7, count, y.get());
  for (int64_t i = 0; i < count; ++i) CHECK(y[i] == x[i] / 7, "by one number");
  divide(x.get(), 0, count, y.get());
  for (int64_t i = 0; i < count; ++i) CHECK(y[i] == 0, "by zero");
}

template <EpsAt at>
Real factored(double root, double column_root, double eps) {
  const Real s = static_cast<Real>(root) * column_root;
  if (at == EpsAt::inside) return 1 / std::sqrt(s * s + eps);
  return 1 / (at == EpsAt::outside ? s + eps : std::fmax(s, static_cast<Real>(eps)));
}

// Both forms of the factor where both may be used, and the sum of squares.
template <EpsAt at, class A>
void test_factored(int64_t count, double eps) {
  const double root = 0.7, ratio = 1.3;
  const auto x = random_values<A>(count, 2, 7);
  auto roots = std::make_unique<double[]>(count), inverses = std::make_unique<double[]>(count);
  for (int64_t j = 0; j < count; ++j) {
    roots[j] = 0.5 + (j % 11) * 0.1;
    inverses[j] = 1 / roots[j];
  }
  auto near = std::make_unique<A[]>(count), far = std::make_unique<A[]>(count);
  const NearFactor f(at);
  const double t = eps / (at == EpsAt::inside ? root * root : root);
  const NearRun run{ratio / root, t, f.linear, f.quadratic};
  scale_near<at == EpsAt::inside>(x.get(), run, inverses.get(), count, near.get());
  auto high = std::make_unique<float[]>(count), low = std::make_unique<float[]>(count);
  auto split = std::make_unique<A[]>(count);
  for (int64_t j = 0; j < count; ++j) {
    const Split s(inverses[j]);
    high[j] = s.high, low[j] = s.low;
  }
  const Splits columns{high.get(), low.get()};
  if constexpr (sizeof(A) == 4) {
    scale_near<at == EpsAt::inside>(x.get(), run, columns, count, split.get());
  }
  scale_far<at>(x.get(), {root, ratio, eps}, roots.get(), count, far.get());
  Real exact_sum = 0;
  const Real allowed = sizeof(A) == 4 ? 1.01L : 10;
  for (int64_t j = 0; j < count; ++j) {
    const Real y = x[j] * factored<at>(root, roots[j], eps);
    exact_sum += y * y;
    CHECK(roundings(near[j], y * ratio) <= allowed, "near, eps %g", eps);
    CHECK(roundings(far[j], y * ratio) <= allowed, "far, eps %g", eps);
    if (sizeof(A) == 4) CHECK(roundings(split[j], y * ratio) <= 1.01L, "split, eps %g", eps);
  }
  const double sum = sum_far<at>(x.get(), {root, 1, eps}, roots.get(), count);
  CHECK(std::fabs(sum - exact_sum) <= 1e-14L * exact_sum, "sum, eps %g", eps);
}

void test_zero_denominators() {
  const float x[3] = {0, 1, -2};
  const double roots[3] = {0, 0, 1};
  float y[3];
  scale_far<EpsAt::outside>(x, {1, 1, 0}, roots, 3, y);
  CHECK(y[0] == 0 && y[1] == 0 && y[2] == -2, "zero over zero is zero");
  CHECK(sum_far<EpsAt::clamp>(x, {0, 1, 0}, roots, 3) == 0, "zero row");
}

}  // namespace

int main() {
  test_rules();
  test_near_factor();
  test_zero_denominators();
  test_splits();
  for (int64_t count = 0; count < 140; ++count) {
    for (const double scale : {1.0, 1e-40, 1e36}) test_sums(count, scale);
    for (const double scale : {1.0, 1e-40, 1e36, 1e-20, 1e18}) {
      test_columns<1, float>(count, scale, 1);
      test_columns<8, float>(count, scale, 1);
      test_columns<32, float>(count, scale, 1e60);
      test_columns<32, float>(count, scale, 1, true);
      test_columns<8, float>(count, scale, 1, false, true);
    }
    test_columns<8, double>(count, 1, 1);
    test_scaling(count);
    test_formats<Bf16>(count);
    test_formats<Fp16>(count);
    test_division(count);
    for (const double eps : {0.0, 1e-12, 1e-7}) {
      test_factored<EpsAt::outside, float>(count, eps);
      test_factored<EpsAt::inside, float>(count, eps);
      test_factored<EpsAt::clamp, float>(count, eps);
      test_factored<EpsAt::outside, double>(count, eps);
      test_factored<EpsAt::inside, double>(count, eps);
      test_factored<EpsAt::clamp, double>(count, eps);
    }
  }
  for (const int64_t count : {1000, 1024, 4097}) {
    test_sums(count, 1);
    test_scaling(count);
    test_columns<32, float>(count, 1, 1);
    test_columns<8, Bf16>(count, 1, 1);
    test_columns<8, Fp16>(count, 1, 1);
  }
  if (failures == 0) std::printf("moments: all passed\n");
  return failures == 0 ? 0 : 1;
}
