// The mean of sinh(x / d)^2 over every matrix, in double.
#include "../sinh_square.h"

#include "elementwise.h"

namespace orthonorm {
namespace {

Tensor mean_sinh_square(const TensorList& X, const Tensor& divisors) {
  const std::vector<double> by = numbers("mean_sinh_square", "divisors", divisors);
  const Pass<1> pass("mean_sinh_square", Unit::matrix, {{{"X", X, Use::read}}});
  const int64_t count = static_cast<int64_t>(pass.parts().size());
  STD_TORCH_CHECK(divisors.numel() == count, "mean_sinh_square: divisors must have ", count,
                  " numbers, got ", divisors.numel());
  std::vector<double> sums(pass.blocks());
  pass.run([&]<class A>(const Part<1>& part, int64_t begin, const std::array<A*, 1>& at,
                        int64_t length) {
    const double d = by[&part - pass.parts().data()];
    double& place = sums[part.block(begin)];
    double sum = place;
    specialized([&] {
      for (int64_t i = 0; i < length; i += piece) {
        sum += sum_of_sinh_squares(at[0] + i, d, std::min(piece, length - i));
      }
    });
    place = sum;
  });
  Tensor result = torch::stable::empty({count}, ScalarType::Double, std::nullopt,
                                       torch::stable::Device(torch::headeronly::DeviceType::CPU));
  double* to = static_cast<double*>(result.data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    const Part<1>& part = pass.parts()[i];
    const double* first = sums.data() + part.first_block;
    const double sum = std::accumulate(first, first + Pass<1>::blocks(part.count), 0.0);
    to[i] = sum / static_cast<double>(std::max<int64_t>(part.count, 1));
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("mean_sinh_square", TORCH_BOX(&mean_sinh_square));
}

}  // namespace orthonorm
