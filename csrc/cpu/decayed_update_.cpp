#include "orthonorm.h"
namespace orthonorm {
namespace {
void decayed_update_(TensorList params, TensorList updates, Tensor lr, double weight_decay, std::vector<double> factors) {
  const double rate = item(lr);
  for (size_t i = 0; i < params.size(); ++i) {
    float* w = static_cast<float*>(params[i].data_ptr());
    const float* u = static_cast<const float*>(updates[i].data_ptr());
    for (int64_t j = 0; j < params[i].numel(); ++j) w[j] = (1 - rate * weight_decay) * w[j] - rate * factors[i] * u[j];
  }
}
}
STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("decayed_update_", TORCH_BOX(&decayed_update_)); }
}
