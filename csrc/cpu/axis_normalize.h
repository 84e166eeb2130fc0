// `row_normalize` and `column_normalize`.
#pragma once

#include "axis_scaling.h"

namespace orthonorm {

struct NormalizeRule {
  double scale, eps;
  EpsAt at;

  static constexpr bool keep_norm = false, from_norms = true;
  // A product with the inverse is rounded twice, which only double would notice.
  static bool divides(ScalarType dtype) { return dtype == ScalarType::Double; }

  void factors(const Job& job, bool, int64_t, int64_t count, const double* norms,
               double* factors) const {
    const bool inverted = !divides(job.x.dtype);
    for (int64_t i = 0; i < count; ++i) {
      const double by = divisor(norms[i] * scale, eps, at);
      factors[i] = inverted ? inverse_or_zero(by) : by;
    }
  }
};

inline Tensor axis_normalize(const char* op, const Tensor& X, bool rows, double scale, double eps,
                             const std::string& eps_at) {
  const NormalizeRule rule{scale, eps, parse_eps_at(op, eps_at)};
  std::vector<int64_t> sizes(X.dim());
  for (int64_t d = 0; d < X.dim(); ++d) sizes[d] = X.size(d);
  Tensor out = torch::stable::empty(sizes, X.scalar_type(), std::nullopt, X.device());
  JobList list(op);
  list.add(0, X, out, nullptr, nullptr);
  AxisScaling<NormalizeRule>(list.jobs(), rows, rule).run();
  return out;
}

}  // namespace orthonorm
