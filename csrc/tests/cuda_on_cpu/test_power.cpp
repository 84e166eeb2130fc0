// Power iteration on lists of awkward matrices, against plain loops in double that carry along how
// far rounding may have taken every number.
#include "cuda/power_lists.h"
#include "lists.h"

using namespace orthonorm;
using namespace orthonorm::cuda;
using namespace orthonorm::cuda::test;

namespace {

using enum Element;
using Shape = std::vector<int64_t>;

// A block each, and of several tiles; tails around tiles of 32 rows and runs of 8 columns.
std::vector<Shape> shapes = {{1, 1},    {1, 9},   {7, 1},       {2, 2, 33, 40},
                             {130, 70}, {129, 9}, {2, 140, 31}, {5, 1030}};
std::vector<Lay> lays = {Lay::packed, Lay::transposed, Lay::shifted, Lay::spaced};

// Numbers, and how far off they may be.
struct Vector {
  std::vector<double> x, off;
  explicit Vector(int64_t n) : x(n), off(n) {}

  double norm(const std::vector<double>& of) const {
    double sum = 0;
    for (const double value : of) sum += value * value;
    return std::sqrt(sum);
  }

  void normalize(double eps, double unit) {
    const double length = norm(x), error = norm(off) / length + 4 * unit;
    const double divisor = std::max(length, eps);
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] /= divisor;
      off[i] = off[i] / divisor + std::fabs(x[i]) * error;
    }
  }
};

struct Case {
  Element type, vectors;
  int64_t steps;
  bool v_first;
  double eps, scale;
};

struct Item {
  Values w, u, v;

  Item(const Shape& shape, const Case& c, Lay lay, int seed)
      : w(shape, c.type, lay), u(without(shape, 1), c.vectors, lay),
        v(without(shape, 2), c.vectors, lay) {
    w.fill(seed);
    for (int64_t i = 0; i < w.count(); ++i) w.set(i, w[i] * c.scale);
    u.fill(seed + 1);
    v.fill(seed + 2);
  }

  static Shape without(Shape shape, int back) {
    shape.erase(shape.end() - back);
    return shape;
  }
};

// y = W x or W^T x of matrix b in units of `scale`.
Vector times(const Item& item, int64_t b, bool adjoint, const Vector& x, double scale,
             double unit) {
  const int64_t m = item.w.sizes().end()[-2], n = item.w.sizes().end()[-1];
  const int64_t terms = adjoint ? m : n, results = adjoint ? n : m;
  Vector y(results);
  for (int64_t i = 0; i < results; ++i) {
    for (int64_t j = 0; j < terms; ++j) {
      const double w = item.w[b * m * n + (adjoint ? j * n + i : i * n + j)] / scale;
      y.x[i] += w * x.x[j];
      y.off[i] += std::fabs(w) * (x.off[j] + static_cast<double>(terms + 4) * unit *
                                                 std::fabs(x.x[j]));
    }
  }
  return y;
}

void check(const Item& before, const Item& after, int64_t b, const Case& c, double sigma) {
  const int64_t m = before.w.sizes().end()[-2], n = before.w.sizes().end()[-1];
  const double unit = c.type == f64 ? 0x1p-53 : 0x1p-24;
  Vector u(m), v(n);
  for (int64_t i = 0; i < m; ++i) u.x[i] = before.u[b * m + i];
  for (int64_t j = 0; j < n; ++j) v.x[j] = before.v[b * n + j];
  const auto move = [&](bool left) {
    Vector& to = left ? u : v;
    to = times(before, b, !left, left ? v : u, c.scale, unit);
    to.normalize(c.eps / c.scale, unit);
  };
  for (int64_t step = 0; step < c.steps; ++step) move(!c.v_first), move(c.v_first);
  const Vector y = times(before, b, false, v, c.scale, unit);
  double exact = 0, allowed = 0;
  for (int64_t i = 0; i < m; ++i) {
    exact += u.x[i] * y.x[i];
    allowed += u.off[i] * std::fabs(y.x[i]) + std::fabs(u.x[i]) * y.off[i];
    near(after.u, b * m + i, u.x[i], u.off[i], "u");
  }
  for (int64_t j = 0; j < n; ++j) near(after.v, b * n + j, v.x[j], v.off[j], "v");
  near(sigma / c.scale, exact, allowed + 4 * unit * std::fabs(exact), "sigma");
}

std::vector<double> iterate(const Case& c, std::deque<Item>& items) {
  Memory memory;
  const Device device = memory.device();
  std::vector<double> sigmas(100);
  PowerLists lists(device, {c.steps, c.eps}, reinterpret_cast<char*>(sigmas.data()), f64);
  for (Item& item : items) lists.add(item.w.view(), item.u.view(), item.v.view(), c.v_first);
  lists.finish();
  return sigmas;
}

void run(const Case& c) {
  for (const Lay lay : lays) {
    std::deque<Item> items;
    for (const Shape& shape : shapes) {
      items.emplace_back(shape, c, lay, static_cast<int>(10 * items.size()));
    }
    const auto before = items;
    const std::vector<double> sigmas = iterate(c, items);
    const double* sigma = sigmas.data();
    for (size_t i = 0; i < items.size(); ++i) {
      for (int64_t b = 0; b < matrices(items[i].w.view()); ++b) {
        check(before[i], items[i], b, c, *sigma++);
      }
    }
  }
}

// Zero matrices keep their vectors, a column of zeros keeps W^T of the old u, and NaN stays alone.
void test_special() {
  const Case c{f32, f32, 2, false, 0, 1};
  std::deque<Item> items;
  for (const Shape& shape : {Shape{40, 30}, Shape{200, 30}}) {
    for (int kind = 0; kind < 3; ++kind) {
      Item& item = items.emplace_back(shape, c, Lay::packed, kind);
      for (int64_t i = 0; kind == 0 && i < item.w.count(); ++i) item.w.set(i, 0);
      if (kind == 1) item.w.set(37, NAN);
    }
  }
  const auto before = items;
  const std::vector<double> sigmas = iterate(c, items);
  for (size_t i = 0; i < items.size(); ++i) {
    if (i % 3 == 2) {
      check(before[i], items[i], 0, c, sigmas[i]);
      continue;
    }
    if (i % 3 == 0 ? sigmas[i] != 0 : sigmas[i] == sigmas[i]) near(sigmas[i], 0, -1, "special");
    for (int64_t k = 0; k < items[i].u.count(); ++k) near(items[i].u[k], before[i].u[k], 0, "u");
    for (int64_t k = 0; k < items[i].v.count(); ++k) near(items[i].v[k], before[i].v[k], 0, "v");
  }
  std::deque<Item> one;  // W v = 0: u stays, v follows it
  Item& item = one.emplace_back(Shape{200, 30}, Case{f32, f32, 1, false, 0, 1}, Lay::packed, 5);
  for (int64_t i = 0; i < 200; ++i) item.w.set(30 * i + 4, 0);
  for (int64_t j = 0; j < 30; ++j) item.v.set(j, j == 4);
  const Item old = item;
  iterate({f32, f32, 1, false, 0, 1}, one);
  Vector u(200);
  for (int64_t i = 0; i < 200; ++i) u.x[i] = old.u[i], near(item.u[i], old.u[i], 0, "old u");
  Vector v = times(old, 0, true, u, 1, 0x1p-24);
  v.normalize(0, 0x1p-24);
  for (int64_t j = 0; j < 30; ++j) near(item.v, j, v.x[j], v.off[j], "v of the old u");
}

}  // namespace

// "few": for ThreadSanitizer, which needs a thread for each of CUDA's.
int main(int count, char**) {
  std::vector<Case> cases = {{f32, f32, 1, false, 0, 0x1p119}};
  if (count > 1) {
    shapes = {{33, 20}, {140, 40}};
    lays = {Lay::packed, Lay::transposed};
  } else {
    cases.insert(cases.end(), {{bf16, f32, 2, true, 1e-12, 1},
                               {f16, bf16, 0, false, 0, 1},
                               {f64, f64, 2, false, 0, 0x1p900},
                               {f32, f64, 1, false, 0, 0x1p-100}});
    test_special();
  }
  for (const Case& c : cases) {
    run(c);
    lays.resize(2);
  }
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures != 0;
}
