// Every instruction set, arithmetic and shape class of the small Newton-Schulz kernel, torch-free.
// The oracle is the same polynomial in long double; the yardstick is a plain loop in the kernel's
// own arithmetic, whose error the kernel may not exceed twice. Returns non-zero on failure.
#include "small_newton_schulz.h"
#include "tests/check.h"

#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

using namespace orthonorm;
using namespace orthonorm::small;

namespace {

void check(bool ok, const char* what, Isa isa, Arithmetic arithmetic, int64_t m, int64_t n) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: isa %d, arithmetic %d, %d x %d\n", what, static_cast<int>(isa),
              static_cast<int>(arithmetic), static_cast<int>(m), static_cast<int>(n));
}

const std::vector<double> muon = {3.4445, -4.7750, 2.0315, 3.4445, -4.7750, 2.0315, 3.4445, -4.7750,
                                  2.0315, 3.4445, -4.7750, 2.0315, 3.4445,  -4.7750, 2.0315};
const std::vector<double> cubic = {1.5, -0.5, 0, 1.5, -0.5, 0, 1.5, -0.5, 0};
const Scaling frobenius{true, 0, 1};

template <class T>
T to_bf16(T x) {  // round to nearest even on the upper half
  uint32_t bits;
  const float f = static_cast<float>(x);
  std::memcpy(&bits, &f, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  float rounded;
  std::memcpy(&rounded, &bits, 4);
  return rounded;
}

// The definition by plain loops in T; `round` is applied to every matrix a product reads.
template <class T>
std::vector<T> plain(const std::vector<double>& x, int64_t m, int64_t n,
                     const std::vector<double>& p, const std::function<T(T)>& round) {
  const int64_t L = std::max(m, n), S = std::min(m, n);
  std::vector<T> X(x.size()), A(S * S), B(S * S), Y(x.size());
  long double norm = 0;
  for (const double v : x) norm += static_cast<long double>(v) * v;
  norm = std::sqrt(norm);
  for (int64_t i = 0; i < L; ++i) {
    for (int64_t j = 0; j < S; ++j) {
      const double v = m < n ? x[j * n + i] : x[i * n + j];
      X[i * S + j] = round(static_cast<T>(v / norm));
    }
  }
  const auto product = [](const std::vector<T>& a, int64_t row, int64_t step,
                          const std::vector<T>& b, int64_t column, int64_t width, int64_t K) {
    T sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += a[row + k * step] * b[k * width + column];
    return sum;
  };
  for (size_t t = 0; t < p.size(); t += 3) {
    const T a = static_cast<T>(p[t]), b = static_cast<T>(p[t + 1]), c = static_cast<T>(p[t + 2]);
    for (int64_t i = 0; i < S; ++i) {
      for (int64_t j = 0; j < S; ++j) A[i * S + j] = round(product(X, i, S, X, j, S, L));
    }
    for (int64_t i = 0; i < S; ++i) {
      for (int64_t j = 0; j < S; ++j) {
        B[i * S + j] = round(c * product(A, i * S, 1, A, j, S, S) + b * A[i * S + j]);
      }
    }
    for (int64_t i = 0; i < L; ++i) {
      for (int64_t j = 0; j < S; ++j) {
        Y[i * S + j] = a * X[i * S + j] + product(X, i * S, 1, B, j, S, S);
      }
    }
    const bool last = t + 3 == p.size();
    for (size_t i = 0; i < X.size(); ++i) X[i] = last ? Y[i] : round(Y[i]);
  }
  std::vector<T> out(x.size());
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) out[i * n + j] = m < n ? X[j * S + i] : X[i * S + j];
  }
  return out;
}

template <class T>
double error(const std::vector<T>& x, const std::vector<long double>& exact) {
  long double wrong = 0, all = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    wrong += (x[i] - exact[i]) * (x[i] - exact[i]);
    all += exact[i] * exact[i];
  }
  return static_cast<double>(std::sqrt(wrong / all));
}

// The kernel on a matrix stored with gaps of NaN between rows, possibly by columns, in a workspace
// filled with `garbage`; memory beyond the result and the workspace must stay as it was.
template <class In, class E>
std::vector<E> kernel(Isa isa, Arithmetic arithmetic, const std::vector<double>& x, int64_t m,
                      int64_t n, const std::vector<double>& p, const Scaling& scaling = frobenius,
                      const double* norm = nullptr, bool flipped = false, int64_t gap = 0,
                      uint8_t garbage = 0xff) {
  const int64_t rows = flipped ? n : m, cols = flipped ? m : n, ld = cols + gap;
  std::vector<In> memory(rows * ld, std::numeric_limits<In>::quiet_NaN());
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      memory[flipped ? j * ld + i : i * ld + j] = static_cast<In>(x[i * n + j]);
    }
  }
  memory.resize(rows * ld - gap);  // nothing may be read behind the last row
  memory.shrink_to_fit();
  const std::vector<In> before = memory;
  const int64_t bytes = workspace_bytes(m, n, arithmetic);
  const auto release = [](std::byte* q) { ::operator delete(q, std::align_val_t{64}); };
  const std::unique_ptr<std::byte, decltype(release)> workspace(
      static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64})), release);
  std::memset(workspace.get(), garbage, bytes);
  std::vector<E> y(m * n);  // the address sanitizer watches its ends
  run<In, E>(isa, arithmetic, Source<In>{memory.data(), rows, cols, ld, flipped}, scaling, norm,
             Polynomial{p.data(), static_cast<int64_t>(p.size() / 3)}, workspace.get(), y.data());
  check(std::memcmp(before.data(), memory.data(), before.size() * sizeof(In)) == 0,
        "input unchanged", isa, arithmetic, m, n);
  return y;
}

std::vector<double> random_matrix(int64_t m, int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<double> x(m * n);
  for (double& v : x) v = static_cast<float>(normal(generator));
  return x;
}

template <class E>
bool same(const std::vector<E>& a, const std::vector<E>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(E)) == 0;
}

// One random matrix, its exact result, and the error of plain loops: the same for every kernel.
struct Problem {
  std::vector<double> x;
  std::vector<long double> exact;
  double float32, float64, bfloat16;
  double yardstick(Arithmetic arithmetic) const {
    return arithmetic == Arithmetic::float32   ? float32
           : arithmetic == Arithmetic::float64 ? float64
                                               : bfloat16;
  }
};
const Problem& problem(int64_t m, int64_t n, const std::vector<double>& p, unsigned seed) {
  static std::map<std::tuple<int64_t, int64_t, size_t, unsigned>, Problem> known;
  Problem& q = known[{m, n, p.size(), seed}];
  if (q.x.empty()) {
    q.x = random_matrix(m, n, seed);
    q.exact = plain<long double>(q.x, m, n, p, [](long double v) { return v; });
    q.float32 = error(plain<float>(q.x, m, n, p, [](float v) { return v; }), q.exact);
    q.float64 = error(plain<double>(q.x, m, n, p, [](double v) { return v; }), q.exact);
    q.bfloat16 = error(plain<float>(q.x, m, n, p, to_bf16<float>), q.exact);
  }
  return q;
}

template <class In, class E>
void accuracy(Isa isa, Arithmetic arithmetic, int64_t m, int64_t n, const std::vector<double>& p) {
  const unsigned seeds = m * n > 1000 ? 1 : 10;
  double own = 0, yardstick = 0;
  for (unsigned seed = 0; seed < seeds; ++seed) {
    const Problem& q = problem(m, n, p, seed);
    own += error(kernel<In, E>(isa, arithmetic, q.x, m, n, p), q.exact) / seeds;
    yardstick += q.yardstick(arithmetic) / seeds;
  }
  // Plain loops may be exact for 1 x 1: allow a last bit per iteration.
  const double last_bits = static_cast<double>(p.size() / 3) * std::numeric_limits<E>::epsilon();
  check(own <= 2 * yardstick + last_bits, "accuracy", isa, arithmetic, m, n);
}

// Same values, same bits: however they are stored and whatever the workspace held, and for every
// power of two.
template <class In, class E>
void identities(Isa isa, Arithmetic arithmetic, int64_t m, int64_t n) {
  const std::vector<double> x = random_matrix(m, n, 7);
  const std::vector<E> y = kernel<In, E>(isa, arithmetic, x, m, n, muon);
  const auto again = [&](bool flipped, int64_t gap, uint8_t garbage) {
    return kernel<In, E>(isa, arithmetic, x, m, n, muon, frobenius, nullptr, flipped, gap, garbage);
  };
  check(same(y, again(false, 0, 0x7f)), "workspace", isa, arithmetic, m, n);
  check(same(y, again(false, 5, 0)), "row stride", isa, arithmetic, m, n);
  check(same(y, again(true, 0, 0xff)), "stored by columns", isa, arithmetic, m, n);
  check(same(y, again(true, 3, 0x7f)), "stored by columns with gaps", isa, arithmetic, m, n);
  for (const int k : {-1030, -126, -100, -1, 1, 60, 120, 1019}) {
    if (sizeof(In) == 4 && std::abs(k) > 120) continue;
    std::vector<double> scaled = x;
    for (double& v : scaled) v = std::ldexp(v, k);
    check(same(y, kernel<In, E>(isa, arithmetic, scaled, m, n, muon)), "scale", isa, arithmetic, m,
          n);
  }
}

// Zero, clamped, given and no norms; values that are not numbers.
template <class In, class E>
void edges(Isa isa, Arithmetic arithmetic, int64_t m, int64_t n) {
  const std::vector<double> x = random_matrix(m, n, 9), zero(m * n, 0.0);
  const auto finite = [](const std::vector<E>& y, bool wanted) {
    for (const E v : y) {
      if (std::isfinite(v) != wanted) return false;
    }
    return true;
  };
  const std::vector<E> none(m * n, E(0));
  check(same(none, kernel<In, E>(isa, arithmetic, zero, m, n, muon)), "zero", isa, arithmetic, m,
        n);
  const double nothing = 0;
  check(same(none, kernel<In, E>(isa, arithmetic, x, m, n, muon, frobenius, &nothing)), "norm 0",
        isa, arithmetic, m, n);
  // |X|_F = 2^k whenever X holds 2^k and zeros: the three ways to say so agree.
  std::vector<double> one = zero;
  one[m * n - 1] = 0x1p-20;
  const double norm = 0x1p-20;
  const std::vector<E> y = kernel<In, E>(isa, arithmetic, one, m, n, muon);
  check(same(y, kernel<In, E>(isa, arithmetic, one, m, n, muon, frobenius, &norm)), "norm given",
        isa, arithmetic, m, n);
  check(same(y, kernel<In, E>(isa, arithmetic, one, m, n, muon, {true, 0x1p-20, 1})), "eps", isa,
        arithmetic, m, n);
  check(same(y, kernel<In, E>(isa, arithmetic, one, m, n, muon, {false, 0, 0x1p-20})), "no scale",
        isa, arithmetic, m, n);
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(),
                           std::numeric_limits<double>::infinity()}) {
    std::vector<double> broken = x;
    broken[0] = bad;
    check(!finite(kernel<In, E>(isa, arithmetic, broken, m, n, muon), true), "not finite", isa,
          arithmetic, m, n);
  }
  check(finite(kernel<In, E>(isa, arithmetic, x, m, n, {}), true), "no steps", isa, arithmetic, m,
        n);
}

template <class In, class E>
void all(Isa isa, Arithmetic arithmetic) {
  const int64_t shapes[][2] = {{1, 1},   {1, 128},  {128, 1},  {2, 3},    {5, 4},    {7, 16},
                               {15, 15}, {16, 16},  {17, 33},  {33, 17},  {31, 32},  {33, 33},
                               {48, 48}, {49, 50},  {65, 63},  {30, 101}, {128, 128}, {1, 9001},
                               {300, 1}, {2, 301}, {1500, 7}};
  for (const auto& [m, n] : shapes) {
    accuracy<In, E>(isa, arithmetic, m, n, muon);
    if (m + n < 100) accuracy<In, E>(isa, arithmetic, m, n, cubic);
    identities<In, E>(isa, arithmetic, m, n);
    edges<In, E>(isa, arithmetic, m, n);
  }
  accuracy<In, E>(isa, arithmetic, 96, 97, muon);
  accuracy<In, E>(isa, arithmetic, 128, 127, muon);
}

}  // namespace

int main() {
  for (int i = 0; i <= static_cast<int>(detect_isa()); ++i) {
    const Isa isa = static_cast<Isa>(i);
    all<float, float>(isa, Arithmetic::float32);
    all<double, float>(isa, Arithmetic::float32);
    all<float, double>(isa, Arithmetic::float64);
    all<double, double>(isa, Arithmetic::float64);
    if (isa == Isa::avx512bf16) {
      all<float, float>(isa, Arithmetic::bfloat16);
      all<double, float>(isa, Arithmetic::bfloat16);
    }
    if (isa == Isa::amx) {
      all<float, float>(isa, Arithmetic::bfloat16_tiles);
      all<double, float>(isa, Arithmetic::bfloat16_tiles);
    }
  }
  std::printf("small_newton_schulz: %d failures\n", failures);
  return failures != 0;
}
