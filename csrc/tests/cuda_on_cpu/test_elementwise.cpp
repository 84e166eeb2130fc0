// Elementwise kernels on lists of awkward tensors, against the formulas in double.
#include <string>

#include "cuda/adamw_step_.h"
#include "cuda/decayed_update_.h"
#include "cuda/divide_each.h"
#include "cuda/elementwise_moment_.h"
#include "cuda/inner.h"
#include "cuda/magnitude.h"
#include "cuda/muon_prologue_.h"
#include "cuda/rotated_adam_.h"
#include "lists.h"

using namespace orthonorm;
using namespace orthonorm::cuda;
using namespace orthonorm::cuda::test;

namespace {

using enum Element;
using Shape = std::vector<int64_t>;

// Tails of every kind around tiles of 2048 to 8192 elements, many dimensions, nothing at all.
std::vector<Shape> shapes = {{1, 1},    {1, 7},    {13, 29},     {3, 5, 7},   {64, 128},   {91, 90},
                             {2, 0, 3}, {8192, 1}, {3, 64, 128}, {2, 3, 4, 5}, {2049, 4}};
std::vector<Lay> lays = {Lay::packed, Lay::shifted, Lay::transposed, Lay::spaced};

bool few = false;
const double* first_norm;  // of the list that is being checked

// N tensors of every shape, those in `positive` without a sign: runs `op` on all as one list, then
// check(before, after, norms of its matrices, rounding of the arithmetic) of each.
template <class Op, class Check>
void run(const Op& op, Unit unit, unsigned positive,
         const std::vector<std::array<Element, Op::lists>>& dtypes, const Check& check) {
  constexpr int N = Op::lists;
  for (const auto& types : dtypes) {
    if (few && &types != dtypes.data()) break;
    for (const Lay lay : lays) {
      std::deque<std::vector<Values>> items;
      for (const Shape& shape : shapes) {
        std::vector<Values>& item = items.emplace_back();
        for (int k = 0; k < N; ++k) {
          item.emplace_back(shape, types[k], lay);
          item.back().fill(static_cast<int>(7 * items.size()) + k, positive >> k & 1);
        }
      }
      const auto before = items;
      Memory memory;
      const Device device = memory.device();
      std::vector<double> norms(1000);
      first_norm = norms.data();
      auto lists = elementwise(device, unit, op, norms.data());
      for (auto& item : items) {
        std::array<Strided, N> views;
        for (int k = 0; k < N; ++k) views[k] = item[k].view();
        lists.add(views, bit_cast<int64_t>(0.7));
      }
      lists.finish();
      const bool wide = std::find(types.begin(), types.end(), f64) != types.end();
      const double* norm = norms.data();
      for (size_t i = 0; i < items.size(); ++i) {
        check(before[i], items[i], norm, wide ? 0x1p-53 : 0x1p-24);
        norm += matrices(items[i][0].view());
      }
    }
  }
}

// |x| of the matrices of `values`, as `norms` has them.
void check_norms(const Values& values, const double* norms, double unit, const char* what) {
  const int64_t size = values.matrix();
  for (int64_t b = 0; size && b < values.count() / size; ++b) {
    long double sum = 0;
    for (int64_t i = 0; i < size; ++i) {
      const long double x = values[b * size + i];
      sum += x * x;
    }
    const double exact = static_cast<double>(std::sqrt(sum));
    near(norms[b], exact, 4 * unit * exact, what);
  }
}

void test_magnitude() {
  const auto check = [](const auto& before, const auto&, const double* norms, double) {
    check_norms(before[0], norms, 0x1p-50, "magnitude");
  };
  run(MagnitudeOp(), Unit::matrix, 0, {{f32}, {bf16}, {f16}, {f64}}, check);
}

void test_decayed_update() {
  const DecayedUpdateOp op{{Number(0.1), 0.5}};
  const auto check = [](const auto& before, const auto& after, const double*, double unit) {
    for (int64_t i = 0; i < before[0].count(); ++i) {
      double w = before[0][i], terms = std::fabs(w) + std::fabs(before[1][i]);
      decayed_update(DecayedUpdate<double>(0.1, 0.5, 0.7), w, before[1][i]);
      near(after[0], i, w, 4 * unit * terms, "decayed_update_");
      near(after[1], i, before[1][i], 0, "decayed_update_ updates");
    }
  };
  run(op, Unit::tensor, 0, {{f32, f32}, {bf16, f32}, {f16, bf16}, {f64, f32}}, check);
}

void test_rotated_adam() {
  const RotatedAdamOp op{0.9, 0.99, 1e-3, Number(2.0)};
  const auto check = [](const auto& before, const auto& after, const double*, double unit) {
    const RotatedAdam<double> c(0.9, 0.99, 1e-3, 2.0);
    for (int64_t i = 0; i < before[0].count(); ++i) {
      double m = before[0][i], v = before[1][i], x = before[2][i];
      const double terms = std::fabs(m) + std::fabs(x);
      rotated_adam(c, m, v, x);
      near(after[0], i, m, 4 * unit * terms, "rotated_adam_ m");
      near(after[1], i, v, 8 * unit * v, "rotated_adam_ v");
      near(after[2], i, x, 16 * unit * (2 * terms / std::sqrt(v)), "rotated_adam_ x");
    }
  };
  run(op, Unit::tensor, 0b010, {{f32, f32, f32}, {bf16, bf16, f32}, {f64, f32, f16}}, check);
}

void test_adamw() {
  const AdamWRule rule{1e-2, 0.9, 0.99, 1e-3, 0.1, false, true};
  std::vector<AdamWStep<double>> made;
  std::vector<float> steps(shapes.size(), 4);
  Memory memory;
  const Device device = memory.device();
  for (size_t i = 0; i < shapes.size(); ++i) made.emplace_back(rule, 0);
  auto counts = counted(device, {Number(rule.lr), Number(rule.weight_decay)}, rule, made.data());
  for (float& t : steps) counts.add({{reinterpret_cast<char*>(&t), f32, 0, nullptr, nullptr}});
  counts.finish();
  for (const float t : steps) near(t, 5, 0, "adamw_step_ steps");
  const auto check = [&](const auto& before, const auto& after, const double*, double unit) {
    const AdamWStep<double> c(rule, 5);
    for (int64_t i = 0; i < before[0].count(); ++i) {
      double w = before[0][i], m = before[2][i], v = before[3][i], g = before[1][i];
      const double terms = std::fabs(m) + std::fabs(g), old = std::fabs(w);
      adamw_step(c, w, g, m, v);
      const double step = c.size * terms / (std::sqrt(v) + c.eps);
      near(after[0], i, w, 16 * unit * (old + step), "adamw_step_ w");
      near(after[2], i, m, 4 * unit * terms, "adamw_step_ m");
      near(after[3], i, v, 8 * unit * v, "adamw_step_ v");
    }
  };
  run(AdamWOp{made.data()}, Unit::tensor, 0b1000,
      {{f32, f32, f32, f32}, {bf16, bf16, f32, bf16}, {f64, f64, f64, f64}}, check);
}

void test_muon_prologue() {
  const MuonPrologueOp op{Number(0.95), true};
  const auto check = [](const auto& before, const auto& after, const double* norms, double unit) {
    Values exact(before[0].sizes(), f64, Lay::packed);
    for (int64_t i = 0; i < before[0].count(); ++i) {
      const double g = before[0][i];
      double b = before[1][i];
      const double terms = std::fabs(g) + std::fabs(b);
      exact.set(i, muon_prologue(MuonPrologue<double>(0.95, true), g, b));
      near(after[1], i, b, 4 * unit * terms, "muon_prologue_ b");
      near(after[2], i, exact[i], 8 * unit * terms, "muon_prologue_ u");
    }
    check_norms(exact, norms, 16 * unit, "muon_prologue_ norms");
  };
  run(op, Unit::matrix, 0, {{f32, f32, f32}, {bf16, f32, bf16}, {f32, f64, f16}}, check);
}

void test_divide_each() {
  std::vector<float> divisors(1000);
  for (size_t i = 0; i < divisors.size(); ++i) divisors[i] = i % 5 ? static_cast<float>(i) : 0;
  const DivideEachOp op{Number(reinterpret_cast<const char*>(divisors.data()), f32, 1)};
  const auto check = [&](const auto& before, const auto& after, const double* norms, double) {
    for (int64_t i = 0; i < before[0].count(); ++i) {
      const double d = divisors[norms - first_norm + i / before[0].matrix()];
      near(after[1], i, d == 0 ? 0 : before[0][i] / d, 0, "divide_each");
    }
  };
  run(op, Unit::matrix, 0, {{f32, f32}, {f32, bf16}, {bf16, f16}, {f64, f64}, {f32, f64}}, check);
}

void test_inner() {
  const auto check = [](const auto& before, const auto&, const double* sums, double) {
    const int64_t size = before[0].matrix();
    for (int64_t b = 0; size && b < before[0].count() / size; ++b) {
      long double sum = 0, terms = 0;
      for (int64_t i = b * size; i < (b + 1) * size; ++i) {
        const long double product = static_cast<long double>(before[0][i]) * before[1][i];
        sum += product;
        terms += std::fabs(product);
      }
      near(sums[b], static_cast<double>(sum), 0x1p-47 * static_cast<double>(terms), "inner");
    }
  };
  run(InnerOp(), Unit::matrix, 0, {{f32, f32}, {bf16, f16}, {f64, f32}}, check);
}

void test_elementwise_moment() {
  const ElementwiseMomentOp op{0.99, 1e-3, Number(2.0)};
  const auto check = [](const auto& before, const auto& after, const double* norms, double unit) {
    const ElementwiseMoment<double> c(0.99, 1e-3, 2.0);
    Values exact(before[0].sizes(), f64, Lay::packed);
    for (int64_t i = 0; i < before[0].count(); ++i) {
      double v = before[0][i], x = before[1][i];
      elementwise_moment(c, v, x);
      exact.set(i, x);
      near(after[0], i, v, 8 * unit * v, "elementwise_moment_ v");
      near(after[1], i, x, 16 * unit * std::fabs(x), "elementwise_moment_ x");
    }
    check_norms(exact, norms, 16 * unit, "elementwise_moment_ norms");
  };
  run(op, Unit::matrix, 0b01, {{f32, f32}, {f32, bf16}, {f64, f64}}, check);
}

// Halves of weights of which the lower ones begin at random: their floats are updated exactly.
void test_halves() {
  const auto check = [](const auto& before, const auto& after, const double*, double) {
    for (int64_t i = 0; i < before[0].count(); ++i) {
      float w = joined(before[0][i], before[1][i]);
      decayed_update(DecayedUpdate<float>(0.1, 0.5, 0.7), w, static_cast<float>(before[2][i]));
      near(joined(after[0][i], after[1][i]), w, 0, "decayed_update_ of halves");
      near(after[0], i, w, 0x1p-8 * std::fabs(w), "decayed_update_ of halves, weight");
    }
  };
  run(HalvesUpdateOp{{Number(0.1), 0.5}}, Unit::tensor, 0, {{bf16, i16, f32}, {bf16, i16, bf16}},
      check);
}

void test_halves_of_adamw() {
  const AdamWRule rule{1e-2, 0.9, 0.99, 1e-3, 0.1, true, true};
  const std::vector<AdamWStep<double>> made(shapes.size(), AdamWStep<double>(rule, 3));
  const auto check = [&](const auto& before, const auto& after, const double*, double) {
    const AdamWStep<float> c(made[0]);
    for (int64_t i = 0; i < before[0].count(); ++i) {
      float w = joined(before[0][i], before[1][i]), m = before[3][i], v = before[4][i];
      adamw_step(c, w, static_cast<float>(before[2][i]), m, v);
      near(joined(after[0][i], after[1][i]), w, 0, "adamw_step_ of halves");
      near(after[2], i, before[2][i], 0, "adamw_step_ of halves, gradient");
      near(after[3], i, m, 0, "adamw_step_ of halves, m");
      near(after[4], i, v, 0, "adamw_step_ of halves, v");
    }
  };
  run(HalvesAdamWOp{made.data()}, Unit::tensor, 0b10000,
      {{bf16, i16, bf16, f32, f32}, {bf16, i16, f32, f32, f32}}, check);
}

// Nothing is written where an infinity was found, but updates are.
void test_found_inf() {
  const auto unchanged = [](const auto& before, const auto& after, const double*, double) {
    for (size_t k = 0; k < before.size(); ++k) {
      for (int64_t i = 0; i < before[k].count(); ++i) near(after[k][i], before[k][i], 0, "skipped");
    }
  };
  const auto momentum = [](const auto& before, const auto& after, const double*, double) {
    for (int64_t i = 0; i < before[1].count(); ++i) near(after[1][i], before[1][i], 0, "skipped");
  };
  const float found = 2;
  const Number inf(reinterpret_cast<const char*>(&found), f32, 0);
  const AdamWRule rule{1e-2, 0.9, 0.99, 1e-3, 0.1, false, true};
  const std::vector<AdamWStep<double>> made(shapes.size(), AdamWStep<double>(rule, 3));
  run(DecayedUpdateOp{{Number(0.1), 0.5}, {}, inf}, Unit::tensor, 0, {{bf16, f32}}, unchanged);
  run(AdamWOp{made.data(), {}, inf}, Unit::tensor, 0b1000, {{f32, f32, bf16, f32}}, unchanged);
  run(HalvesAdamWOp{made.data(), inf}, Unit::tensor, 0b10000, {{bf16, i16, bf16, f32, f32}},
      unchanged);
  run(MuonPrologueOp{Number(0.95), true, Number(4), inf}, Unit::matrix, 0, {{f32, f32, f32}},
      momentum);
  std::vector<float> steps(shapes.size(), 4);
  auto counted_steps = made;
  Memory memory;
  const Device device = memory.device();
  auto counts = counted(device, {Number(0.1), Number(0.5), Number(1), inf}, rule, counted_steps.data());
  for (float& t : steps) counts.add({{reinterpret_cast<char*>(&t), f32, 0, nullptr, nullptr}});
  counts.finish();
  for (const float t : steps) near(t, 4, 0, "adamw_step_ steps, skipped");
}

}  // namespace

// "few": for ThreadSanitizer, which needs a thread for each of CUDA's.
int main(int count, char**) {
  if (count > 1) {
    shapes = {{2, 13, 29}, {2049, 4}};
    lays = {Lay::packed};
    few = true;
  }
  test_magnitude();
  test_decayed_update();
  test_rotated_adam();
  test_adamw();
  test_muon_prologue();
  test_divide_each();
  test_inner();
  test_elementwise_moment();
  test_halves();
  test_halves_of_adamw();
  test_found_inf();
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures != 0;
}
