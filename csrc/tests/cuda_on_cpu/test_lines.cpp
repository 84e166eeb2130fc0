// Moments and norms of rows and columns on lists of awkward matrices, against the rules in double.
#include "cuda/line_lists.h"
#include "lists.h"

using namespace orthonorm;
using namespace orthonorm::cuda;
using namespace orthonorm::cuda::test;

namespace {

using enum Element;
using Shape = std::vector<int64_t>;

// Tails around tiles of 128 x 256 and groups of 256 lines.
std::vector<Shape> shapes = {{1, 1},     {1, 7},   {13, 29}, {2, 3, 5, 7},
                             {129, 257}, {300, 8}, {8, 300}};
std::vector<Lay> lays = {Lay::packed, Lay::shifted, Lay::transposed, Lay::spaced};

struct Item {
  Values x, out, rows, columns;

  Item(const Shape& shape, Element type, Element moment, Lay lay, int seed)
      : x(shape, type, lay), out(shape, type, Lay::packed), rows(reduced(shape, 1), moment, lay),
        columns(reduced(shape, 2), moment, lay) {
    x.fill(seed);
    rows.fill(seed + 1, true);
    columns.fill(seed + 2, true);
  }

  // `shape` with 1 for its last dimension but `back` - 1.
  static Shape reduced(Shape shape, int back) {
    shape.end()[-back] = 1;
    return shape;
  }
};

struct Case {
  LineRule rule;
  bool rows, columns;
  Element type, moment;
};

// Moments of one matrix of an item in double; `m` rows and `n` columns from element `first` on.
struct Exact {
  std::vector<double> rows, columns, out;

  Exact(const Item& item, const Case& c, int64_t b, int64_t m, int64_t n)
      : rows(m), columns(n), out(m * n) {
    std::vector<double> squares_of_rows(m), squares_of_columns(n);
    for (int64_t i = 0; i < m * n; ++i) {
      out[i] = item.x[b * m * n + i];
      squares_of_rows[i / n] += out[i] * out[i];
      squares_of_columns[i % n] += out[i] * out[i];
    }
    for (int64_t i = 0; i < m; ++i) {
      rows[i] = decayed(item.rows[b * m + i], squares_of_rows[i] / n, c.rule.beta2);
    }
    for (int64_t j = 0; j < n; ++j) {
      columns[j] = decayed(item.columns[b * n + j], squares_of_columns[j] / m, c.rule.beta2);
    }
    double mean = 0, before = 0, after = 0;
    for (const double r : rows) mean += r / m;
    for (int64_t i = 0; i < m * n; ++i) {
      const double r = rows[i / n], l = columns[i % n];
      const double square = c.rule.factored ? r * l / mean : c.rows ? r : l;
      double factor = inverse_or_zero(denominator(square, c.rule.eps, c.rule.at));
      if (!c.rule.moments) {
        const double sum = c.rows ? squares_of_rows[i / n] : squares_of_columns[i % n];
        factor = inverse_or_zero(divisor(std::sqrt(sum) * c.rule.scale, c.rule.eps, c.rule.at));
      }
      before += out[i] * out[i];
      out[i] *= factor;
      after += out[i] * out[i];
    }
    const double keep = c.rule.moments && c.rule.keep_norm ? norm_ratio(before, after) : 1;
    for (double& x : out) x *= keep;
  }
};

void check(const Item& before, const Item& after, const Case& c) {
  const int64_t m = before.x.sizes().end()[-2], n = before.x.sizes().end()[-1];
  const double unit = c.type == f64 ? 0x1p-53 : 0x1p-24, few = 64 * unit;
  for (int64_t b = 0; b < before.x.count() / (m * n); ++b) {
    const Exact exact(before, c, b, m, n);
    const Values& out = c.rule.moments ? after.x : after.out;
    for (int64_t i = 0; i < m * n; ++i) {
      near(out, b * m * n + i, exact.out[i], few * std::fabs(exact.out[i]), "out");
    }
    if (!c.rule.moments) continue;
    for (int64_t i = 0; c.rows && i < m; ++i) {
      near(after.rows, b * m + i, exact.rows[i], few * exact.rows[i], "moments of rows");
    }
    for (int64_t j = 0; c.columns && j < n; ++j) {
      near(after.columns, b * n + j, exact.columns[j], few * exact.columns[j],
           "moments of columns");
    }
  }
}

void run(const Case& c) {
  for (const Lay lay : lays) {
    std::deque<Item> items;
    for (const Shape& shape : shapes) {
      items.emplace_back(shape, c.type, c.moment, lay, static_cast<int>(10 * items.size()));
    }
    const auto before = items;
    Memory memory;
    const Device device = memory.device();
    LineLists lists(device, c.rule, c.rows, c.columns);
    for (Item& item : items) {
      const Strided x = item.x.view(), out = c.rule.moments ? x : item.out.view();
      Strided rows = x, columns = x;
      rows.data = columns.data = nullptr;
      if (c.rule.moments && c.rows) rows = item.rows.view();
      if (c.rule.moments && c.columns) columns = item.columns.view();
      lists.add({x, out, {rows, columns}});
    }
    lists.finish();
    for (size_t i = 0; i < items.size(); ++i) check(before[i], items[i], c);
  }
}

}  // namespace

// "few": for ThreadSanitizer, which needs a thread for each of CUDA's.
int main(int count, char**) {
  if (count > 1) {
    shapes = {{2, 13, 29}, {130, 260}};
    lays = {Lay::packed};
  }
  const LineRule norm{0, 1e-3, 0.5, EpsAt::outside, false, false, false};
  const LineRule moment{0.9, 1e-3, 1, EpsAt::inside, true, true, false};
  const LineRule factored{0.9, 1e-3, 1, EpsAt::clamp, true, true, true};
  std::vector<Case> cases = {{factored, true, true, bf16, f32}};
  if (count == 1) {
    cases.insert(cases.end(), {{norm, true, false, f32, f32},
                               {norm, false, true, bf16, f32},
                               {moment, true, false, f16, bf16},
                               {moment, false, true, f32, f64},
                               {factored, true, true, f64, f64}});
  }
  for (const Case& c : cases) run(c);
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures != 0;
}
