#include "axis_scaling.h"

namespace orthonorm {
namespace {

void normalize_columns_(TensorList out, TensorList X, double eps) {
  STD_TORCH_CHECK(out.size() == X.size(), "normalize_columns_: lists must have equal lengths, got ",
                  out.size(), " out and ", X.size(), " X");
  const AxisRule rule{false, 0, 1, eps, EpsAt::outside, false};
  JobList list("normalize_columns_");
  for (size_t i = 0; i < X.size(); ++i) {
    const Facts x(X[i]), to(out[i]);
    STD_TORCH_CHECK(to.same_shape(x) && to.dtype == x.dtype, "normalize_columns_: out[", i,
                    "] must have the shape and dtype of X[", i, "] ", x.shape(), ", got ",
                    to.shape());
    list.add(i, X[i], out[i], nullptr, nullptr);
  }
  scale_axis(list.jobs(), false, rule);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("normalize_columns_", TORCH_BOX(&normalize_columns_));
}

}  // namespace orthonorm
