// <X, Y> of every pair of matrices, in double.
#include "elementwise.h"

namespace orthonorm {
namespace {

// Products in 64 interleaved sums, then halves: the same order for every instruction set.
template <class A>
double product_sum(const A* x, const A* y, int64_t count) {
  constexpr int64_t lanes = 64;
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      sums[lane] += static_cast<double>(x[i + lane]) * static_cast<double>(y[i + lane]);
    }
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) {
    sums[lane] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  }
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

Tensor inner(const TensorList& X, const TensorList& Y) {
  const Pass<2> pass("inner", Unit::matrix, {{{"X", X, Use::read}, {"Y", Y, Use::read}}});
  std::vector<double> sums(pass.blocks());
  pass.run([&]<class A>(const Part<2>& part, int64_t begin, const std::array<A*, 2>& at,
                        int64_t count) {
    double& place = sums[part.block(begin)];
    double sum = place;
    specialized([&] {
      for (int64_t i = 0; i < count; i += piece) {
        sum += product_sum(at[0] + i, at[1] + i, std::min(piece, count - i));
      }
    });
    place = sum;
  });
  const int64_t count = static_cast<int64_t>(pass.parts().size());
  Tensor result = torch::stable::empty({count}, ScalarType::Double, std::nullopt,
                                       torch::stable::Device(torch::headeronly::DeviceType::CPU));
  double* to = static_cast<double*>(result.data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    const Part<2>& part = pass.parts()[i];
    const double* first = sums.data() + part.first_block;
    to[i] = std::accumulate(first, first + Pass<2>::blocks(part.count), 0.0);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("inner", TORCH_BOX(&inner)); }

}  // namespace orthonorm
