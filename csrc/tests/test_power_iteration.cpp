// Power iteration against plain sums in double: every element type and stride, every instruction
// set this machine has, any number of threads, any scale.
//
//   g++ -std=c++20 -O2 -Icsrc csrc/tests/test_power_iteration.cpp -pthread && ./a.out
#include "power_schedule.h"
#include "tests/check.h"
#include "tests/stored.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

using namespace orthonorm;
using namespace orthonorm::power;

namespace {

std::vector<Isa> sets() {
  std::vector<Isa> all;
  for (const Isa set : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (set <= detect_isa()) all.push_back(set);
  }
  return all;
}

template <class A>
std::vector<A> normals(int64_t count, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<A> x(count);
  for (A& value : x) value = static_cast<A>(normal(random));
  return x;
}

// ---- sweeps ----------------------------------------------------------------

template <class A>
struct Swept {
  std::vector<A> left, sums;
};

template <class T, class A = Sums<T>>
Swept<A> sweep(const Stored<T>& w, Sweep what, const std::vector<A>& right,
               const std::vector<A>& left, Isa set, int exponent = 0) {
  const int64_t padded = width<A>(w.cols);
  Swept<A> out{left, std::vector<A>(padded)};
  std::vector<A> x(right), scratch(scratch_for<A>(w.cols));
  x.resize(padded);
  Source source = w.source();
  source.exponent = exponent;
  sweep_block<A>(source, 0,
                 {what, w.rows, w.cols, 0, x.data(), out.left.data(), out.sums.data(),
                  scratch.data()},
                 set);
  out.sums.resize(w.cols);
  return out;
}

// |error| of a sum of `terms` terms whose magnitudes add up to `size`.
template <class A>
double allowed(double size, int64_t terms) {
  const double unit = sizeof(A) == 8 ? 0x1p-53 : 0x1p-24;
  return static_cast<double>(terms + 2) * unit * size;
}

template <class T>
void check_sweep(const Stored<T>& w, std::mt19937& random) {
  using A = Sums<T>;
  const std::vector<A> right = normals<A>(w.cols, random), left = normals<A>(w.rows, random);
  for (const Isa set : sets()) {
    const Swept<A> product = sweep(w, Sweep::product, right, left, set);
    const Swept<A> adjoint = sweep(w, Sweep::adjoint, right, left, set);
    const Swept<A> both = sweep(w, Sweep::both, right, left, set);
    for (int64_t i = 0; i < w.rows; ++i) {
      double want = 0, size = 0;
      for (int64_t j = 0; j < w.cols; ++j) {
        want += w.at(i, j) * right[j], size += std::fabs(w.at(i, j) * right[j]);
      }
      CHECK(std::fabs(product.left[i] - want) <= allowed<A>(size, w.cols), "row %ld of %ldx%ld",
            static_cast<long>(i), static_cast<long>(w.rows), static_cast<long>(w.cols));
    }
    for (int64_t j = 0; j < w.cols; ++j) {
      double want = 0, size = 0;
      for (int64_t i = 0; i < w.rows; ++i) {
        want += w.at(i, j) * left[i], size += std::fabs(w.at(i, j) * left[i]);
      }
      CHECK(std::fabs(adjoint.sums[j] - want) <= allowed<A>(size, w.rows), "column %ld",
            static_cast<long>(j));
    }
    // One pass is two passes, bit for bit, and so is one on a copy (another exponent).
    const Swept<A> second = sweep(w, Sweep::adjoint, right, product.left, set);
    CHECK(both.left == product.left, "both, rows");
    CHECK(both.sums == second.sums, "both, columns");
    const Swept<A> copied = sweep(w, Sweep::both, right, left, set, 3);
    for (int64_t i = 0; i < w.rows; ++i) CHECK(copied.left[i] * 8 == both.left[i], "copied row");
    for (int64_t j = 0; j < w.cols; ++j) {
      CHECK(copied.sums[j] * 64 == both.sums[j], "copied column");
    }
  }
}

template <class T>
void test_sweeps(std::mt19937& random) {
  for (const int64_t rows : {1, 2, 3, 4, 5, 8, 9, 13, 31, 130}) {
    for (const int64_t cols : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 127}) {
      check_sweep(Stored<T>(rows, cols, cols, 1, random), random);
      check_sweep(Stored<T>(rows, cols, cols + 5, 1, random), random);
    }
    check_sweep(Stored<T>(rows, 40, 85, 2, random), random);
    check_sweep(Stored<T>(rows, 2300, 2300, 1, random), random);  // more than one chunk of a row
  }
  check_sweep(Stored<T>(20, 30, 1, 20, random), random);
}

void test_wide_registers_agree(std::mt19937& random) {
  if (detect_isa() < Isa::avx512) return;
  const Stored<float> w(37, 203, 203, 1, random);
  const auto right = normals<float>(203, random), left = normals<float>(37, random);
  const auto narrow = sweep(w, Sweep::both, right, left, Isa::avx2);
  const auto wide = sweep(w, Sweep::both, right, left, Isa::avx512);
  CHECK(narrow.left == wide.left && narrow.sums == wide.sums, "avx2 and avx512 differ");
}

// ---- formulas --------------------------------------------------------------

void test_half_step() {
  const Half free = half_step(25.0, 3.0, 0.0);
  CHECK(free.factor == 0.2 && free.estimate == 15.0, "%g %g", free.factor, free.estimate);
  const Half clamped = half_step(25.0, 3.0, 30.0);  // |W x| = 15 < 30
  CHECK(clamped.factor == 0.1 && clamped.estimate == 7.5, "%g", clamped.factor);
  CHECK(comfortable<float>(1.0, 1) && !comfortable<float>(0x1p-81, 1), "low");
  CHECK(comfortable<float>(0x1p120, 2) && !comfortable<float>(0x1p120, 1), "high");
  CHECK(!comfortable<float>(0.0, 1) && !comfortable<float>(std::nan(""), 1), "zero, NaN");
  CHECK(!comfortable<double>(std::numeric_limits<double>::infinity(), 2), "infinity");
}

void test_order_of_sweeps() {
  const auto order = [](int64_t steps, bool left_first, bool rescaled) {
    Progress p({steps, left_first, 0.0});
    if (rescaled) p.rescale(0);
    std::vector<Sweep> all;
    for (Sweep s = p.next(); s != Sweep::done; s = p.next()) {
      all.push_back(s);
      if (p.evaluates()) {
        p.evaluate(1);
        continue;
      }
      if (s != Sweep::adjoint) p.product(1);
      if (s != Sweep::product) p.adjoint(1);
    }
    return all;
  };
  using V = std::vector<Sweep>;
  constexpr Sweep P = Sweep::product, A = Sweep::adjoint, B = Sweep::both;
  CHECK(order(0, true, false) == V({P}), "evaluation");
  CHECK(order(2, true, false) == V({B, B}), "k passes");
  CHECK(order(2, false, false) == V({A, B, P}), "k + 1 passes");
  CHECK(order(2, true, true) == V({P, A, P, A}), "rescaled");
  CHECK(order(1, false, true) == V({A, P}), "rescaled");
}

// ---- lists -----------------------------------------------------------------

// Float and double matrices with their vectors; the Io of the schedule.
struct List {
  std::vector<Matrix> matrices;
  std::vector<Stored<float>> floats;
  std::vector<std::vector<float>> quotients;  // W / sigma, W itself for 0
  std::vector<std::vector<double>> left, right;
  mutable std::vector<std::vector<double>> new_left, new_right;
  mutable std::vector<double> sigmas;

  void add(int64_t rows, int64_t cols, std::mt19937& random) {
    floats.emplace_back(rows, cols, cols, 1, random);
    left.push_back(normals<double>(rows, random));
    right.push_back(normals<double>(cols, random));
  }

  void run(const Rule& rule, int64_t threads, double scale = 1) {
    matrices.clear();
    new_left = left, new_right = right;
    sigmas.assign(floats.size(), -1);
    auto scaled = floats;
    quotients.clear();
    for (auto& w : scaled) {
      for (float& x : w.memory) x = static_cast<float>(x * scale);
      quotients.emplace_back(w.memory.size(), -1.0f);
      const Target to{quotients.back().data(), w.cols, 1};
      matrices.push_back({w.source(), w.rows, w.cols, rule, to});
    }
    const auto team = [](int64_t n, const auto& f) {
      std::vector<std::thread> members;
      for (int64_t t = 1; t < n; ++t) members.emplace_back([&f, t] { f(t); });
      f(0);
      for (auto& member : members) member.join();
    };
    iterate(matrices, *this, threads, team, isa());
    for (size_t i = 0; i < scaled.size(); ++i) check_quotient(scaled[i].memory, i);
  }

  // In double, rounded once or by ties to the other side; NaN throughout where sigma is.
  void check_quotient(const std::vector<float>& w, size_t i) const {
    const double sigma = static_cast<float>(sigmas[i]), by = sigma == 0 ? 1 : sigma;
    for (size_t k = 0; k < w.size(); ++k) {
      const float got = quotients[i][k], want = static_cast<float>(w[k] / by);
      const bool close = std::nextafter(got, want) == want;
      CHECK(std::isnan(want) ? std::isnan(got) : close, "quotient %zu of %zu: %g", k, i, got);
    }
  }

  template <class A>
  void load(int64_t i, Side side, A* to) const {
    const auto& x = side == Side::left ? left[i] : right[i];
    for (size_t k = 0; k < x.size(); ++k) to[k] = static_cast<A>(x[k]);
  }
  template <class A>
  void store(int64_t i, Side side, const A* from) const {
    auto& x = side == Side::left ? new_left[i] : new_right[i];
    for (size_t k = 0; k < x.size(); ++k) x[k] = from[k];
  }
  void sigma(int64_t i, double value) const { sigmas[i] = value; }
};

double norm(const std::vector<double>& x) {
  double sum = 0;
  for (const double value : x) sum += value * value;
  return std::sqrt(sum);
}

// The definition in double.
struct Plain {
  std::vector<double> left, right;
  double sigma = 0;

  Plain(const List& list, size_t i, const Rule& rule) : left(list.left[i]), right(list.right[i]) {
    const auto& w = list.floats[i];
    const auto half = [&](bool product) {
      std::vector<double>&to = product ? left : right, &from = product ? right : left;
      std::vector<double> y(to.size());
      for (int64_t r = 0; r < w.rows; ++r) {
        for (int64_t c = 0; c < w.cols; ++c) {
          y[product ? r : c] += w.at(r, c) * from[product ? c : r];
        }
      }
      if (norm(y) == 0) return;
      const double divisor = std::max(norm(y), rule.eps);
      for (size_t k = 0; k < y.size(); ++k) to[k] = y[k] / divisor;
    };
    for (int64_t s = 0; s < rule.steps; ++s) half(rule.left_first), half(!rule.left_first);
    for (int64_t r = 0; r < w.rows; ++r) {
      for (int64_t c = 0; c < w.cols; ++c) sigma += left[r] * w.at(r, c) * right[c];
    }
  }
};

double distance(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> d(a);
  for (size_t i = 0; i < d.size(); ++i) d[i] -= b[i];
  return norm(d);
}

void test_lists(std::mt19937& random) {
  List list;
  for (const auto& [rows, cols] : std::vector<std::pair<int, int>>{
           {1, 1}, {3, 40}, {300, 700}, {64, 64}, {700, 300}, {20, 9000}, {5000, 3}, {500, 500}}) {
    list.add(rows, cols, random);
  }
  for (const Rule& rule : {Rule{0, true, 0.0}, Rule{1, true, 0.0}, Rule{3, true, 1e-12},
                           Rule{1, false, 0.0}, Rule{2, false, 60.0}}) {
    list.run(rule, 1);
    const List one = list;
    for (size_t i = 0; i < list.floats.size(); ++i) {
      const Plain want(list, i, rule);
      // Vectors of length 1, or shorter by a clamp; each step may multiply errors a little.
      CHECK(distance(one.new_left[i], want.left) <= 2e-5 * norm(want.left), "left %zu", i);
      CHECK(distance(one.new_right[i], want.right) <= 2e-5 * norm(want.right), "right %zu", i);
      const double size = norm(list.left[i]) * norm(list.right[i]) * 100;
      CHECK(std::fabs(one.sigmas[i] - want.sigma) <=
                (rule.steps == 0 ? 1e-6 * size : 1e-5 * want.sigma),
            "sigma %zu: %g, not %g", i, one.sigmas[i], want.sigma);
    }
    for (const int64_t threads : {2, 3, 4}) {
      for (int repeat = 0; repeat < 5; ++repeat) {
        list.run(rule, threads);
        CHECK(list.sigmas == one.sigmas && list.new_left == one.new_left &&
                  list.new_right == one.new_right && list.quotients == one.quotients,
              "%ld threads", static_cast<long>(threads));
      }
    }
    if (rule.eps > 0) continue;
    for (const double scale : {0x1p-100, 0x1p-45, 0x1p45, 0x1p110}) {
      list.run(rule, 2, scale);
      for (size_t i = 0; i < list.sigmas.size(); ++i) {
        CHECK(list.sigmas[i] == one.sigmas[i] * scale, "sigma %zu at scale %g", i, scale);
        CHECK(list.new_left[i] == one.new_left[i] && list.new_right[i] == one.new_right[i],
              "vectors %zu at scale %g", i, scale);
      }
    }
  }
}

// What is wrong stays in its own matrix, whose vectors stay as they were.
void test_special_values(std::mt19937& random) {
  List clean;
  for (int i = 0; i < 6; ++i) clean.add(300, 400, random);
  for (const bool left_first : {true, false}) {
    for (const int64_t steps : {0, 1, 2}) {
      List list = clean;
      const Rule rule{steps, left_first, 0.0};
      clean.run(rule, 2);
      list.floats[1].memory[1234] = std::nanf("");
      list.floats[2].memory[1234] = std::numeric_limits<float>::infinity();
      std::fill(list.floats[3].memory.begin(), list.floats[3].memory.end(), 0.0f);
      std::fill(list.left[4].begin(), list.left[4].end(), 0.0);
      std::fill(list.right[4].begin(), list.right[4].end(), 0.0);
      list.run(rule, 2);
      for (const size_t i : {0, 5}) {
        CHECK(list.sigmas[i] == clean.sigmas[i] && list.new_left[i] == clean.new_left[i],
              "neighbour %zu", i);
      }
      for (const size_t i : {1, 2}) CHECK(std::isnan(list.sigmas[i]), "sigma %zu", i);
      for (const size_t i : {3, 4}) CHECK(list.sigmas[i] == 0, "sigma %zu", i);
      for (const size_t i : {1, 2, 3, 4}) {
        CHECK(list.new_left[i] == list.left[i] && list.new_right[i] == list.right[i],
              "vectors %zu", i);
      }
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  test_sweeps<float>(random);
  test_sweeps<double>(random);
  test_sweeps<Bf16>(random);
  test_sweeps<Fp16>(random);
  test_wide_registers_agree(random);
  test_half_step();
  test_order_of_sweeps();
  test_lists(random);
  test_special_values(random);
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
