// Packed products against plain sums in double, for every instruction set this machine has.
//
//   g++ -std=c++20 -O2 -Icsrc csrc/tests/test_gemm.cpp -pthread && ./a.out
#include "gemm.h"
#include "tests/check.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>

using namespace orthonorm;
using namespace orthonorm::gemm;

namespace {

const Isa SETS[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx};

const Parallel on_threads = [](int64_t n, const Range& f) {
  std::vector<std::thread> team;
  for (int64_t i = 0; i < n; ++i) team.emplace_back([&f, i] { f(i, i + 1); });
  for (auto& member : team) member.join();
};

template <class T>
double number(T x) {
  return static_cast<double>(widen(x));
}

// Rounding unit of T and of the sums.
template <class T>
double unit() {
  if (std::is_same_v<T, double>) return 0x1p-53;
  if (std::is_same_v<T, float>) return 0x1p-24;
  return std::is_same_v<T, Bf16> ? 0x1p-8 : 0x1p-11;
}

enum class Order { rows, columns, spread };

// A batch of matrices with the strides of `order`, in exactly as much memory as they need, so that
// AddressSanitizer sees a read beyond the last element.
template <class T>
struct Matrices {
  int64_t batch, rows, cols;
  std::vector<T> memory;
  Strided<const T> view;

  Matrices(int64_t b, int64_t r, int64_t c, Order order, std::mt19937& random)
      : batch(b), rows(r), cols(c) {
    const int64_t gap = order == Order::spread ? 3 : 1;
    Strided<const T> at;
    at.row = order == Order::columns ? 1 : c * gap + (order == Order::spread ? 5 : 0);
    at.col = order == Order::columns ? r : gap;
    at.batch = std::max<int64_t>(0, (r - 1) * at.row + (c - 1) * at.col + 1);
    memory.resize(r * c == 0 ? 0 : b * at.batch);
    std::normal_distribution<float> normal;
    for (T& x : memory) narrow(std::is_same_v<T, double> ? normal(random) : normal(random), x);
    at.data = memory.data();
    view = at;
  }
  double operator()(int64_t b, int64_t i, int64_t j) const {
    return number(*view.matrix(b).at(i, j));
  }
};

// Per element: alpha sum_k L(i, k) R(k, j) + beta E(i, j), and how far rounding may lead from it.
struct Expected {
  std::vector<double> value, bound;
};

template <class T>
Expected expect(const Product<T>& batch) {
  // Sums are in float at least; a chunk of CHUNK<float> lanes at most rounds at most that often.
  const double sums = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
  Expected out;
  for (int64_t b = 0; b < batch.batch; ++b) {
    const Product<T> p = batch.matrix(b);
    const Strided<const T> R = p.gram ? p.L.transposed() : p.R;
    for (int64_t at = 0; at < p.rows * p.cols; ++at) {
      const int64_t row = at / p.cols, col = at % p.cols;
      const int64_t i = p.symmetric ? std::max(row, col) : row;
      const int64_t j = p.symmetric ? std::min(row, col) : col;
      double sum = 0, size = 0;
      for (int64_t k = 0; k < p.depth; ++k) {
        const double term = number(*p.L.at(i, k)) * number(*R.at(k, j));
        sum += term, size += std::abs(term);
      }
      const double extra = p.E.data == nullptr ? 0 : p.beta * number(*p.E.at(i, j));
      const double value = p.alpha * sum + extra;
      size = std::abs(p.alpha) * size + std::abs(extra);
      out.value.push_back(value);
      out.bound.push_back(unit<T>() * std::abs(value) + (2.0 * CHUNK<float> + 8) * sums * size +
                          1e-44);
    }
  }
  return out;
}

template <class T>
void compare(const char* name, const Product<T>& p, const Expected& want, Isa set) {
  for (int64_t at = 0; at < p.batch * p.rows * p.cols; ++at) {
    const int64_t b = at / (p.rows * p.cols), i = at / p.cols % p.rows, j = at % p.cols;
    const double got = number(*p.D.matrix(b).at(i, j));
    if (std::abs(got - want.value[at]) <= want.bound[at]) continue;
    ++failures;
    std::printf("%s: isa %d, %ld x %ld x %ld, matrix %ld (%ld, %ld): %.9g, want %.9g\n", name,
                static_cast<int>(set), static_cast<long>(p.rows), static_cast<long>(p.cols),
                static_cast<long>(p.depth), static_cast<long>(b), static_cast<long>(i),
                static_cast<long>(j), got, want.value[at]);
    return;
  }
}

// Every set, on one and on three threads, which must agree bitwise; guards stand beside each line.
template <class T>
void run(const char* name, Product<T> p, bool by_columns = false) {
  const int64_t gap = 2, length = by_columns ? p.rows : p.cols, ld = length + gap;
  const int64_t size = (by_columns ? p.cols : p.rows) * ld;
  const Expected want = expect(p);
  for (const Isa set : SETS) {
    if (set > detect_isa()) continue;
    T guard;
    std::memset(&guard, 0xC3, sizeof guard);
    std::vector<T> one(p.batch * size, guard), many(p.batch * size, guard);
    p.D = {one.data(), by_columns ? 1 : ld, by_columns ? ld : 1, size};
    multiply<T, T>(p, 1, on_threads, set);
    compare(name, p, want, set);
    p.D.data = many.data();
    multiply<T, T>(p, 3, on_threads, set);
    CHECK(one.empty() || std::memcmp(one.data(), many.data(), one.size() * sizeof(T)) == 0,
          "%s: threads change bits, isa %d, %ld x %ld x %ld", name, static_cast<int>(set),
          static_cast<long>(p.rows), static_cast<long>(p.cols), static_cast<long>(p.depth));
    for (size_t i = 0; i < one.size(); ++i) {
      if (static_cast<int64_t>(i % ld) < length) continue;
      CHECK(std::memcmp(&one[i], &guard, sizeof(T)) == 0, "%s: wrote beside the result", name);
    }
  }
}

template <class T>
void shapes() {
  std::mt19937 random(7);
  const int64_t sizes[][2] = {{1, 1},   {1, 9},   {5, 1},    {3, 3},   {4, 17},
                              {13, 29}, {31, 33}, {33, 31},  {48, 64}, {49, 257},
                              {97, 55}, {65, 130}, {50, 400}, {5, 0},   {205, 70}};
  for (const auto& [m, n] : sizes) {
    for (const Order order : {Order::rows, Order::columns, Order::spread}) {
      const Matrices<T> X(2, m, n, order, random), A(2, m, m, order, random);
      const Matrices<T> C(2, m, m, Order::rows, random);
      Product<T> gram;
      gram.batch = 2, gram.rows = gram.cols = m, gram.depth = n, gram.L = X.view;
      gram.symmetric = gram.gram = true;
      run("gram", gram);
      Product<T> update;
      update.batch = 2, update.rows = update.cols = update.depth = m;
      update.L = A.view, update.R = C.view, update.E = A.view;
      update.alpha = -1.25, update.beta = 0.75, update.symmetric = true;
      run("symmetric_update", update);
      Product<T> apply;
      apply.batch = 2, apply.rows = apply.depth = m, apply.cols = n;
      apply.L = C.view, apply.R = X.view, apply.E = X.view, apply.beta = 2.5;
      run("apply", apply, order == Order::columns);
    }
  }
}

// Deeper than a slab, where sums pass through memory, and wider than one.
template <class T>
void deep() {
  std::mt19937 random(8);
  const Matrices<T> X(1, 13, 2 * SLAB + 77, Order::rows, random);
  const Matrices<T> Y(1, 2 * SLAB + 77, 401, Order::rows, random);
  Product<T> gram;
  gram.rows = gram.cols = X.rows, gram.depth = X.cols, gram.L = X.view;
  gram.symmetric = gram.gram = true;
  run("deep gram", gram);
  Product<T> plain;
  plain.rows = X.rows, plain.depth = X.cols, plain.cols = Y.cols, plain.L = X.view;
  plain.R = Y.view;
  run("deep product", plain);
}

// D = D - Q N in place, and a non-finite matrix beside finite ones.
template <class T>
void in_place(Isa set) {
  std::mt19937 random(9);
  const Matrices<T> Q(1, 37, 37, Order::columns, random), N(1, 37, 70, Order::rows, random);
  Matrices<T> W(1, 37, 70, Order::rows, random);
  std::vector<T> fresh(W.memory.size());
  Product<T> p;
  p.rows = p.depth = 37, p.cols = 70, p.alpha = -1.0, p.beta = 1.0;
  p.L = Q.view, p.R = N.view, p.E = W.view, p.D = {fresh.data(), 70, 1, 0};
  multiply<T, T>(p, 2, on_threads, set);
  p.D.data = W.memory.data();
  multiply<T, T>(p, 2, on_threads, set);
  CHECK(std::memcmp(fresh.data(), W.memory.data(), fresh.size() * sizeof(T)) == 0, "in place");

  Matrices<T> X(3, 21, 45, Order::rows, random);
  T bad;
  if constexpr (std::is_same_v<T, double>) {
    bad = std::numeric_limits<double>::infinity();
  } else {
    narrow(std::numeric_limits<float>::infinity(), bad);
  }
  X.memory[21 * 45 + 20 * 45 + 44] = bad;
  std::vector<T> out(3 * 21 * 21);
  Product<T> gram;
  gram.batch = 3, gram.rows = gram.cols = 21, gram.depth = 45, gram.L = X.view;
  gram.symmetric = gram.gram = true, gram.D = {out.data(), 21, 1, 21 * 21};
  multiply<T, T>(gram, 2, on_threads, set);
  for (int64_t i = 0; i < 3 * 21 * 21; ++i) {
    const int64_t row = i / 21 % 21, col = i % 21;
    const bool touched = i / 441 == 1 && (row == 20 || col == 20);
    CHECK(std::isfinite(number(out[i])) != touched, "infinity spread to or from %ld",
          static_cast<long>(i));
  }
}

// Every 16-bit number survives the round trip, and rounding is to nearest, ties to even.
void conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Fp16 half{static_cast<uint16_t>(bits)};
    const Bf16 brain{static_cast<uint16_t>(bits)};
    const int exponent = bits >> 10 & 31;
    const double magnitude = exponent == 0 ? std::ldexp(bits & 1023, -24)
                                           : std::ldexp(1024 + (bits & 1023), exponent - 25);
    const float wide = widen(half);
    Fp16 half_again;
    Bf16 brain_again;
    narrow(wide, half_again), narrow(widen(brain), brain_again);
    if (exponent < 31) {
      CHECK(wide == (bits & 0x8000 ? -magnitude : magnitude), "fp16 %x is %g", bits, wide);
    }
    CHECK(std::isnan(wide) ? std::isnan(widen(half_again)) : half_again.bits == bits, "%x", bits);
    CHECK(std::isnan(widen(brain)) ? std::isnan(widen(brain_again)) : brain_again.bits == bits,
          "%x", bits);
    if ((bits & 0x7fff) >= 0x7c00) continue;
    // Halfway to the next number and a step to both sides of it.
    const double next = widen(Fp16{static_cast<uint16_t>(bits + 1)});
    const double above = (bits & 0x7fff) == 0x7bff ? (bits & 0x8000 ? -65536.0 : 65536.0) : next;
    const float middle = static_cast<float>((number(half) + above) / 2);
    Fp16 tie, below, beyond;
    narrow(middle, tie);
    narrow(std::nextafter(middle, 0.0f), below);
    narrow(std::nextafter(middle, middle * 2), beyond);
    CHECK(tie.bits == bits + (bits & 1), "tie at %x gave %x", bits, tie.bits);
    CHECK(below.bits == bits && beyond.bits == bits + 1, "beside the tie at %x", bits);
  }
}

// Memory of a call that is over serves the next of about its size; none that is still in use.
void recycled() {
  constexpr int64_t large = int64_t{8} << 20;
  const auto fill = [](Workspace& w, int byte) {
    return std::memset(w.take<char>(large), byte, static_cast<size_t>(large));
  };
  void* left = nullptr;
  {
    Workspace over(large);
    left = fill(over, 0xff);
  }
  Workspace little(large / 4), next(large), beside(large);
  const auto* byte = next.take<unsigned char>(large);
  CHECK(byte == left && byte[large - 1] == 0xff, "new memory, not %p", left);
  CHECK(little.take<char>(1) != left && fill(beside, 1) != left, "%p given twice", left);
  CHECK(byte[0] == 0xff, "written by its neighbour: %d", byte[0]);
}

template <class T>
void all() {
  shapes<T>();
  deep<T>();
  for (const Isa set : SETS) {
    if (set <= detect_isa()) in_place<T>(set);
  }
}

}  // namespace

int main() {
  recycled();
  conversions();
  all<float>();
  all<double>();
  all<Bf16>();
  all<Fp16>();
  std::printf(failures == 0 ? "gemm: all passed\n" : "gemm: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
