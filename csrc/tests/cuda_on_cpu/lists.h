// Tensors for tests of kernels: any dtype, strides and alignment, in memory of exactly their size.
#pragma once

#include <cstdio>
#include <deque>
#include <random>
#include <vector>

#include "cuda/table.h"
#include "tests/check.h"

namespace orthonorm::cuda::test {

// How a tensor lies in memory.
enum class Lay { packed, shifted, transposed, spaced };

class Values {
 public:
  Values(std::vector<int64_t> sizes, Element type, Lay lay)
      : sizes_(std::move(sizes)), type_(type) {
    int64_t span = lay == Lay::spaced ? 3 : 1;
    strides_.resize(sizes_.size());
    std::vector<size_t> order;
    for (size_t d = sizes_.size(); d-- > 0;) order.push_back(d);
    if (lay == Lay::transposed && order.size() > 1) std::swap(order[0], order[1]);
    for (const size_t d : order) strides_[d] = span, span *= sizes_[d];
    count_ = 1;
    for (const int64_t size : sizes_) count_ *= size;
    const int64_t last = count_ ? offset(count_ - 1) + 1 : 0;
    front_ = lay == Lay::shifted ? 1 : 0;
    memory_.resize((front_ + last) * size_of(type_));  // the sanitizer guards its end
  }

  const std::vector<int64_t>& sizes() const { return sizes_; }
  int64_t count() const { return count_; }
  int64_t matrix() const { return sizes_.end()[-1] * sizes_.end()[-2]; }  // elements of one
  Element type() const { return type_; }
  Strided view() {
    return {memory_.data() + front_ * size_of(type_), type_, static_cast<int64_t>(sizes_.size()),
            sizes_.data(), strides_.data()};
  }

  // Element i in the order of indices, in double; what is set is rounded to the dtype.
  double operator[](int64_t i) const {
    return load<double>(memory_.data() + byte(i), type_, type_ == Element::i16);
  }
  void set(int64_t i, double x) {
    store(memory_.data() + byte(i), type_, x, type_ == Element::i16);
  }

  void fill(int seed, bool positive = false) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count_; ++i) {
      const double x = normal(engine) * (type_ == Element::i16 ? 5000 : 1);
      set(i, positive ? std::fabs(x) : x);
    }
  }

  // Half the distance between neighbours of a number of this size in this dtype.
  double half_ulp(double x) const {
    const int bits = type_ == Element::bf16 ? 8 : type_ == Element::f16 ? 11
                     : type_ == Element::f32 ? 24 : 53;
    const double least = type_ == Element::f16 ? 0x1p-14 : 0x1p-126;
    int exponent;
    std::frexp(std::max(std::fabs(x), least), &exponent);
    return std::ldexp(0.5, exponent - bits);
  }

 private:
  int64_t offset(int64_t i) const {
    int64_t result = 0;
    for (size_t d = sizes_.size(); d-- > 0; i /= sizes_[d]) result += i % sizes_[d] * strides_[d];
    return result;
  }
  int64_t byte(int64_t i) const { return (front_ + offset(i)) * size_of(type_); }

  std::vector<int64_t> sizes_, strides_;
  Element type_;
  int64_t count_, front_;
  std::vector<char> memory_;
};

// Memory of launches, each piece of exactly its size.
class Memory {
 public:
  Device device() {
    return {nullptr, [this](int64_t bytes) {
              pieces_.emplace_back(bytes, static_cast<char>(0xA5));
              return static_cast<void*>(pieces_.back().data());
            }};
  }

 private:
  std::deque<std::vector<char>> pieces_;
};

// |got - exact| is at most the rounding to `values`' dtype and `allowed`.
inline void near(const Values& values, int64_t i, double exact, double allowed, const char* what) {
  const double got = values[i], error = std::fabs(got - exact);
  if (error <= values.half_ulp(exact) + values.half_ulp(got) + allowed) return;
  if (++failures < 20) std::printf("%s[%lld]: %.17g, not %.17g\n", what, (long long)i, got, exact);
}

inline void near(double got, double exact, double allowed, const char* what) {
  if (std::fabs(got - exact) <= allowed) return;
  if (++failures < 20) std::printf("%s: %.17g, not %.17g\n", what, got, exact);
}

}  // namespace orthonorm::cuda::test
