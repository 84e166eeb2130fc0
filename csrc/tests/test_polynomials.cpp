// The polynomials that stay packed, against the same formulas in double.
//
//   g++ -std=c++20 -O2 -Icsrc csrc/tests/test_polynomials.cpp && ./a.out
//
// Buffers are as long as they need to be, so that AddressSanitizer sees a read or write beyond
// them.
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "direct_polynomial.h"
#include "gram_polynomial.h"
#include "tests/check.h"

using namespace orthonorm;
using namespace orthonorm::gemm;

namespace {

using Matrix = std::vector<double>;  // row after row
using Triples = std::vector<Triple>;

const Triples QUINTIC = {{3.4445, -4.775, 2.0315}, {3.4445, -4.775, 2.0315}};
const Triples MIXED = {{1.5, -0.5, 0}, {3.4445, -4.775, 2.0315}, {1.5, -0.5, 0}};
// More threads than the machine may have, one after the other.
const Parallel in_turn = [](int64_t n, const Range& f) {
  for (int64_t i = 0; i < n; ++i) f(i, i + 1);
};

Matrix product(const Matrix& L, const Matrix& R, int64_t rows, int64_t depth, int64_t cols) {
  Matrix D(rows * cols);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < cols; ++j) D[i * cols + j] += L[i * depth + k] * R[k * cols + j];
    }
  }
  return D;
}

Matrix gram_of(const Matrix& X, int64_t n, int64_t m) {
  Matrix turned(n * m);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) turned[j * n + i] = X[i * m + j];
  }
  return product(X, turned, n, m, n);
}

// a I + b R + c R^2.
Matrix step(const Matrix& R, const Triple& t, int64_t n) {
  Matrix Z = product(R, R, n, n, n);
  for (int64_t i = 0; i < n * n; ++i) Z[i] = t.b * R[i] + t.c * Z[i];
  for (int64_t i = 0; i < n; ++i) Z[i * n + i] += t.a;
  return Z;
}

Matrix direct(Matrix X, const Triples& triples, int64_t n, int64_t m) {
  for (const Triple& t : triples) X = product(step(gram_of(X, n, m), t, n), X, n, n, m);
  return X;
}

Matrix gram_form(Matrix R, const Triples& triples, int64_t n) {
  Matrix Q;
  for (const Triple& t : triples) {
    const Matrix Z = step(R, t, n);
    Q = Q.empty() ? Z : product(Q, Z, n, n, n);
    R = product(product(R, Z, n, n, n), Z, n, n, n);
  }
  return Q;
}

template <class T>
double epsilon() {
  return sizeof(T) == 8 ? 1e-15 : sizeof(T) == 4 ? 1e-6 : std::is_same_v<T, Bf16> ? 8e-3 : 1e-3;
}

template <class T>
void compare(const char* what, const std::vector<T>& got, const Matrix& want, int64_t n,
             int64_t m) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    worst = std::fmax(worst, std::fabs(widen(got[i]) - want[i]));
    largest = std::fmax(largest, std::fabs(want[i]));
  }
  if (worst <= 20 * epsilon<T>() * largest) return;
  ++failures;
  std::printf("%s %d x %d, %d bytes: off by %g of %g\n", what, static_cast<int>(n),
              static_cast<int>(m), static_cast<int>(sizeof(T)), worst, largest);
}

template <class T>
void test(int64_t n, int64_t m, const Triples& triples, int64_t threads) {
  std::mt19937 random(static_cast<unsigned>(n * 1000 + m));
  std::normal_distribution<double> normal(0, 0.5 / (std::sqrt(n) + std::sqrt(m)));
  constexpr int64_t batch = 2;
  std::vector<T> X(batch * n * m), out(batch * n * m), R(batch * n * n), Q(batch * n * n);
  std::vector<Matrix> exact(batch, Matrix(n * m)), squares(batch);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < n * m; ++i) {
      narrow(normal(random), X[b * n * m + i]);
      exact[b][i] = widen(X[b * n * m + i]);
    }
    const Matrix A = gram_of(exact[b], n, m);
    squares[b] = A;
    for (int64_t i = 0; i < n * n; ++i) {
      narrow(static_cast<decltype(widen(T()))>(A[i]), R[b * n * n + i]);
      squares[b][i] = widen(R[b * n * n + i]);
    }
  }
  direct_polynomial<T, T>({X.data(), m, 1, n * m}, triples, {out.data(), m, 1, n * m}, batch, n, m,
                          threads, in_turn, isa());
  gram_polynomial<T, T>({R.data(), n, 1, n * n}, triples, {Q.data(), n, 1, n * n}, batch, n,
                        threads, in_turn, isa());
  if constexpr (std::is_same_v<T, float>) {  // a result rounded to another type
    std::vector<Bf16> rounded(batch * n * n);
    gram_polynomial<T, Bf16>({R.data(), n, 1, n * n}, triples, {rounded.data(), n, 1, n * n},
                             batch, n, threads, in_turn, isa());
    for (int64_t i = 0; i < batch * n * n; ++i) {
      Bf16 want;
      narrow(Q[i], want);
      failures += rounded[i].bits != want.bits;
    }
  }
  if constexpr (std::is_same_v<T, Bf16>) {  // a result not rounded
    std::vector<float> wide(batch * n * m);
    direct_polynomial<T, float>({X.data(), m, 1, n * m}, triples, {wide.data(), m, 1, n * m},
                                batch, n, m, threads, in_turn, isa());
    for (int64_t i = 0; i < batch * n * m; ++i) {
      Bf16 want;
      narrow(wide[i], want);
      failures += out[i].bits != want.bits;
    }
  }
  for (int64_t b = 0; b < batch; ++b) {
    const std::vector<T> mine(out.begin() + b * n * m, out.begin() + (b + 1) * n * m);
    compare("direct", mine, direct(exact[b], triples, n, m), n, m);
    const std::vector<T> chain(Q.begin() + b * n * n, Q.begin() + (b + 1) * n * n);
    compare("gram", chain, gram_form(squares[b], triples, n), n, n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        failures += widen(chain[i * n + j]) != widen(chain[j * n + i]);
      }
    }
  }
}

template <class T>
void test_all() {
  const int64_t sides[][2] = {{1, 1}, {1, 9}, {2, 5}, {17, 31}, {33, 40}, {50, 97}, {97, 100}};
  for (const auto& [n, m] : sides) {
    test<T>(n, m, QUINTIC, 1);
    test<T>(n, m, MIXED, 3);
  }
  test<T>(200, 210, QUINTIC, 2);
}

// Beside multiples of I numbers below the normal ones are 0, on every thread; where there are none
// they keep their values. The caller has its mode back.
void test_subnormal() {
  constexpr int64_t n = 300;
  constexpr uint64_t MODES = 0xffc0;  // of x86, without the flags that results raise
  const uint64_t before = float_mode();
  const Parallel on_threads = [&](int64_t count, const Range& f) {  // of an older pool
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) {
      threads.emplace_back([&f, before, i] {
        set_float_mode(before);
        f(i, i + 1);
      });
    }
    for (std::thread& thread : threads) thread.join();
  };
  const auto run = [&](double diagonal, const Triples& triples, int64_t threads) {
    std::vector<float> R(n * n, 1e-40f), Q(n * n);
    for (int64_t i = 0; i < n; ++i) R[i * n + i] = static_cast<float>(diagonal);
    gram_polynomial<float, float>({R.data(), n, 1, 0}, triples, {Q.data(), n, 1, 0}, 1, n, threads,
                                  on_threads, isa());
    return Q;
  };
  for (const int64_t threads : {1, 3}) {
    const std::vector<float> near_one = run(1, {{1.875, -1.25, 0.375}, {1.5, -0.5, 0}}, threads);
    const std::vector<float> tiny = run(1e-40, {{0, 1, 0}}, threads);
    for (int64_t i = 0; i < n * n; ++i) {
      failures += FLUSH_TO_ZERO != 0 && near_one[i] != (i % (n + 1) == 0 ? 1.0f : 0.0f);
      failures += tiny[i] != 1e-40f;
    }
  }
  failures += (float_mode() & MODES) != (before & MODES);
}

}  // namespace

int main() {
  test_subnormal();
  test_all<float>();
  test_all<double>();
  test_all<Bf16>();
  test_all<Fp16>();
  if (failures == 0) std::printf("polynomials: all passed\n");
  return failures == 0 ? 0 : 1;
}
