// Newton-Schulz and the Gram chain of small matrices on lists of awkward ones, against plain loops
// in double. How far rounding may take a result is measured: by loops that round every product
// where the kernel rounds it, of which the kernel may be off twice as far.
#include "cuda/cluster_direct_polynomial.h"
#include "cuda/cluster_gram_polynomial.h"
#include "cuda/small_newton_schulz.h"
#include "lists.h"

using namespace orthonorm;
using namespace orthonorm::cuda;
using namespace orthonorm::cuda::test;

namespace {

using enum Element;
using Shape = std::vector<int64_t>;
using Matrix = std::vector<double>;
const std::vector<double> quintic = {3.4445, -4.7750, 2.0315, 3.4445, -4.7750, 2.0315};
const std::vector<double> cubic = {1.5, -0.5, 0, 1.5, -0.5, 0, 1.5, -0.5, 0};

std::vector<Shape> shapes = {{1, 1},   {5, 7},    {2, 2, 17, 33}, {32, 32},
                             {50, 44}, {100, 20}, {72, 128}};
std::vector<Lay> lays = {Lay::packed, Lay::transposed, Lay::shifted, Lay::spaced};

// The arithmetic of a reference: exact, or rounded to T where the kernel stores.
struct Exact {
  double operator()(double x) const { return x; }
};
template <class T>
struct Rounds {
  double operator()(double x) const { return widened(rounded<T>(x)); }
};

// left right, or left right^T for two of n rows.
Matrix product(const Matrix& left, const Matrix& right, int64_t n, int64_t m, int64_t depth,
               bool turned) {
  Matrix to(n * m);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t k = 0; k < depth; ++k) {
        to[i * m + j] += left[i * depth + k] * right[turned ? j * depth + k : k * m + j];
      }
    }
  }
  return to;
}

template <class F>
Matrix mixed(double alpha, const Matrix& x, double beta, const Matrix& y, const F& f) {
  Matrix to(x.size());
  for (size_t i = 0; i < x.size(); ++i) to[i] = f(alpha * x[i] + beta * y[i]);
  return to;
}

template <class F>
Matrix scaled(Matrix X, const F& f) {
  double norm = 0;
  for (const double x : X) norm += x * x;
  for (double& x : X) x = norm == 0 ? 0 : f(x / std::sqrt(norm));
  return X;
}

template <class F>
Matrix direct_polynomial(Matrix X, int64_t n, int64_t m, const std::vector<double>& c,
                         const F& f) {
  for (size_t t = 0; t < c.size(); t += 3) {
    const Matrix A = mixed(1, product(X, X, n, n, m, true), 0, Matrix(n * n), f);
    const Matrix B = mixed(c[t + 2], product(A, A, n, n, n, false), c[t + 1], A, f);
    X = mixed(1, product(B, X, n, m, n, false), c[t], X, f);
  }
  return X;
}

template <class F>
Matrix gram_polynomial(Matrix R, int64_t n, const std::vector<double>& c, const F& f) {
  Matrix Q(n * n);
  for (int64_t i = 0; i < n; ++i) Q[i * n + i] = 1;
  for (size_t t = 0; t < c.size(); t += 3) {
    const Matrix Z = mixed(c[t + 2], product(R, R, n, n, n, false), c[t + 1], R, f);
    Q = mixed(1, product(Q, Z, n, n, n, false), c[t], Q, f);
    const Matrix W = mixed(1, product(R, Z, n, n, n, false), c[t], R, f);
    R = mixed(1, product(W, Z, n, n, n, false), c[t], W, f);
  }
  return Q;
}

// Matrix b, wide; and the place of its element (i, j).
Matrix wide(const Values& x, int64_t b, bool tall, int64_t n, int64_t m) {
  Matrix to(n * m);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) to[i * m + j] = x[b * n * m + (tall ? j * n + i : i * m + j)];
  }
  return to;
}

// Squares of the errors of a kernel and of the rounded loops, over all matrices of a run.
struct Errors {
  double kernel = 0, loops = 0;

  // `reference(x, n, m, rounding)` is what a wide matrix should become.
  template <class Reference, class F>
  void add_matrices(Values& X, const Values& out, const Reference& reference, const F& rounds) {
    const int64_t rows = X.sizes().end()[-2], columns = X.sizes().end()[-1];
    const int64_t n = std::min(rows, columns), m = std::max(rows, columns);
    for (int64_t b = 0; b < matrices(X.view()); ++b) {
      const Matrix x = wide(X, b, rows > columns, n, m);
      add(wide(out, b, rows > columns, n, m), reference(x, n, m, rounds),
          reference(x, n, m, Exact{}));
    }
  }

  void check(const char* what) const {
    if (std::sqrt(kernel) <= 2 * std::sqrt(loops)) return;
    ++failures;
    std::printf("%s: off by %g, the rounded loops by %g\n", what, std::sqrt(kernel),
                std::sqrt(loops));
  }

 private:
  void add(const Matrix& got, const Matrix& like, const Matrix& exact) {
    for (size_t i = 0; i < exact.size(); ++i) {
      kernel += (got[i] - exact[i]) * (got[i] - exact[i]);
      loops += (like[i] - exact[i]) * (like[i] - exact[i]);
    }
  }
};

template <class T>
void newton_schulz_of(std::deque<Values>& X, std::deque<Values>& out,
                      const std::vector<double>& c) {
  Memory memory;
  const Device device = memory.device();
  const SmallPolynomial polynomial("small_newton_schulz", c);
  auto lists = small_newton_schulz_lists<T>(device, polynomial, {true, 0, 1, false, 0.0});
  for (size_t i = 0; i < X.size(); ++i) lists.add(X[i].view(), out[i].view().data);
  lists.finish();
}

template <class T>
void test_newton_schulz(Element type, Lay lay, double scale, const std::vector<double>& c) {
  std::deque<Values> X, out;
  for (const Shape& shape : shapes) {
    out.emplace_back(shape, type, Lay::packed);
    Values& x = X.emplace_back(shape, type, lay);
    x.fill(static_cast<int>(X.size()));
    for (int64_t i = 0; i < x.count(); ++i) x.set(i, x[i] * scale);
  }
  newton_schulz_of<T>(X, out, c);
  Errors errors;
  for (size_t i = 0; i < X.size(); ++i) {
    errors.add_matrices(X[i], out[i], [&](const Matrix& x, int64_t n, int64_t m, const auto& f) {
      return direct_polynomial(scaled(x, f), n, m, c, f);
    }, Rounds<T>{});
  }
  errors.check("small_newton_schulz");
}

using ListsOf = SmallLists (*)(const Device&, const SmallPolynomial&);

// As small matrices as fit: clusters' strips of 32 rows, where kernels have 64.
template <class T, int blocks>
SmallLists gram_of_clusters(const Device& device, const SmallPolynomial& polynomial) {
  return SmallLists([=, &device](const SmallTable& table, int) {
    launch_gram_polynomial<Strips<T, blocks, 32>>(table, polynomial, device);
  });
}
template <class T, int blocks>
SmallLists direct_of_clusters(const Device& device, const SmallPolynomial& polynomial) {
  return SmallLists([=, &device](const SmallTable& table, int) {
    launch_direct_polynomial<Strips<T, blocks, 32>>(table, polynomial, device);
  });
}

void run(ListsOf lists_of, Values& X, Values& out, const std::vector<double>& c) {
  Memory memory;
  const Device device = memory.device();
  auto lists = lists_of(device, SmallPolynomial("polynomial", c));
  lists.add(X.view(), out.view().data);
  lists.finish();
}

template <class T>
void test_direct_polynomial(Element type, const Shape& shape, Lay lay, ListsOf lists_of) {
  Values X(shape, type, lay), out(shape, type, Lay::packed);
  X.fill(7);
  const double n = static_cast<double>(shape.end()[-2]), m = static_cast<double>(shape.end()[-1]);
  for (int64_t i = 0; i < X.count(); ++i) X.set(i, X[i] / (std::sqrt(n) + std::sqrt(m)));
  run(lists_of, X, out, quintic);
  Errors errors;
  errors.add_matrices(X, out, [](const Matrix& x, int64_t n, int64_t m, const auto& f) {
    return direct_polynomial(x, n, m, quintic, f);
  }, Rounds<T>{});
  errors.check("direct_polynomial");
}

template <class T>
void test_gram_polynomial(Element type, int64_t n, const std::vector<double>& c,
                          ListsOf lists_of = gram_polynomial_lists<T>) {
  Values R({2, n, n}, type, Lay::packed), Q({2, n, n}, type, Lay::packed);
  R.fill(3);
  for (int64_t b = 0; b < 2; ++b) {
    const Matrix G = wide(R, b, false, n, n), A = product(G, G, n, n, n, true);
    for (int64_t i = 0; i < n * n; ++i) R.set(b * n * n + i, A[i] / (4 * n));
  }
  run(lists_of, R, Q, c);
  Errors errors;
  errors.add_matrices(R, Q, [&](const Matrix& r, int64_t n, int64_t, const auto& f) {
    return gram_polynomial(r, n, c, f);
  }, Rounds<T>{});
  for (int64_t i = 0; i < R.count(); ++i) {
    const int64_t at = i % (n * n), mirrored = i - at + at % n * n + at / n;
    near(Q, i, Q[mirrored], 0, "symmetric");
  }
  errors.check("gram_polynomial");
}

// Zero in, zero out; a NaN stays in its matrix, whose neighbours are as without it.
void test_special() {
  std::deque<Values> X, out, clean;
  for (int kind = 0; kind < 2; ++kind) {
    X.emplace_back(Shape{3, 20, 18}, f32, Lay::packed).fill(5);
    for (auto* results : {&out, &clean}) results->emplace_back(Shape{3, 20, 18}, f32, Lay::packed);
  }
  for (int64_t i = 0; i < 360; ++i) X[1].set(360 + i, 0);
  newton_schulz_of<Bf16>(X, clean, quintic);
  X[0].set(360 + 77, NAN);
  newton_schulz_of<Bf16>(X, out, quintic);
  for (int64_t i = 0; i < 3 * 360; ++i) {
    near(out[1][i], i / 360 == 1 ? 0 : clean[1][i], 0, "zero");
    if (i / 360 != 1) near(out[0][i], clean[0][i], 0, "beside NaN");
  }
  if (out[0][360] == out[0][360]) near(out[0][360], 0, -1, "NaN");
}

}  // namespace

// "few": for ThreadSanitizer, which needs a thread for each of CUDA's.
int main(int count, char**) {
  if (count > 1) {
    shapes = {{17, 33}, {40, 36}};
    test_newton_schulz<Fp16>(f32, Lay::packed, 1, {quintic.begin(), quintic.begin() + 3});
    test_gram_polynomial<Fp16>(f16, 20, quintic);
    test_gram_polynomial<Fp16>(f16, 34, quintic);
    test_gram_polynomial<Fp16>(f16, 40, quintic, gram_of_clusters<Fp16, 2>);
    test_direct_polynomial<Fp16>(f16, {40, 70}, Lay::packed, direct_of_clusters<Fp16, 2>);
  } else {
    test_newton_schulz<Fp16>(f16, Lay::packed, 1, quintic);
    shapes.pop_back();
    test_newton_schulz<Fp16>(f32, Lay::transposed, 1e36, cubic);
    test_newton_schulz<Bf16>(bf16, Lay::shifted, 1e-30, quintic);
    test_newton_schulz<Bf16>(f32, Lay::spaced, 1e-40, cubic);
    for (const int64_t n : {1, 17, 48, 100}) {
      test_gram_polynomial<Fp16>(f16, n, quintic);
      if (n < 50) test_gram_polynomial<Bf16>(bf16, n, cubic);
    }
    test_gram_polynomial<Fp16>(f16, 64, quintic, gram_of_clusters<Fp16, 4>);
    test_gram_polynomial<Bf16>(bf16, 90, cubic, gram_of_clusters<Bf16, 4>);
    test_gram_polynomial<Fp16>(f16, 170, cubic, gram_of_clusters<Fp16, 8>);
    for (const Lay lay : lays) {
      test_direct_polynomial<Fp16>(f16, {2, 70, 50}, lay, direct_of_clusters<Fp16, 2>);
    }
    test_direct_polynomial<Bf16>(bf16, {97, 128}, Lay::shifted, direct_of_clusters<Bf16, 4>);
    test_direct_polynomial<Fp16>(f16, {33, 250}, Lay::packed, direct_of_clusters<Fp16, 2>);
    test_special();
  }
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures != 0;
}
