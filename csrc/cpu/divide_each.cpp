// Every matrix of a batch over a number of its own, rounded once.
#include "elementwise.h"

namespace orthonorm {
namespace {

// x / d in double, and 0 for d = 0; `odd`: on the way to a 16-bit type, which rounds it.
template <class A>
void quotients(const A* __restrict x, double d, bool odd, int64_t count, A* __restrict y) {
  if (d == 0) return static_cast<void>(std::fill(y, y + count, A(0)));
  if constexpr (sizeof(A) == 4) {
    if (odd) {
      for (int64_t i = 0; i < count; ++i) y[i] = to_odd(static_cast<double>(x[i]) / d);
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) y[i] = static_cast<A>(static_cast<double>(x[i]) / d);
}

Tensor divide_each(const Tensor& X, const Tensor& divisors, ScalarType dtype) {
  const std::vector<double> by = numbers("divide_each", "divisors", divisors);
  std::vector<int64_t> sizes(X.dim());
  for (int64_t d = 0; d < X.dim(); ++d) sizes[d] = X.size(d);
  Tensor out = torch::stable::empty(sizes, dtype, std::nullopt, X.device());
  const TensorList from{X}, to{out};
  const Pass<2> pass("divide_each", Unit::matrix,
                     {{{"X", from, Use::read}, {"out", to, Use::write}}});
  STD_TORCH_CHECK(by.size() == pass.parts().size(), "divide_each: divisors must have ",
                  pass.parts().size(), " numbers, got ", by.size());
  const bool odd = element_size(dtype) == 2;
  pass.run([&]<class A>(const Part<2>& part, int64_t, const std::array<A*, 2>& at, int64_t count) {
    const double d = by[&part - pass.parts().data()];
    specialized([=] { quotients(at[0], d, odd, count, at[1]); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("divide_each", TORCH_BOX(&divide_each));
}

}  // namespace orthonorm
