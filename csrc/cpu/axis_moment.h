// `row_moment_` and `column_moment_`.
#pragma once

#include "axis_scaling.h"

namespace orthonorm {

struct MomentRule {
  double beta2, eps;
  EpsAt at;
  bool keep_norm;

  static constexpr bool from_norms = false;
  static bool divides(ScalarType) { return false; }

  void factors(const Job& job, bool outer, int64_t first, int64_t count, const double* squares,
               double* factors) const {
    const Line& moments = outer ? job.along_outer() : job.along_inner();
    const double summed = static_cast<double>(outer ? job.x.inner : job.x.outer);
    moments.read(first, count, factors);
    for (int64_t i = 0; i < count; ++i) {
      factors[i] = decayed(factors[i], squares[i] / summed, beta2);
    }
    moments.write(first, count, factors);
    for (int64_t i = 0; i < count; ++i) {
      factors[i] = inverse_or_zero(denominator(factors[i], eps, at));
    }
  }
};

inline void axis_moment(const char* op, const TensorList& moments, const TensorList& X, bool rows,
                        double beta2, double eps, const std::string& eps_at, bool keep_norm) {
  STD_TORCH_CHECK(moments.size() == X.size(), op, ": lists must have equal lengths, got ",
                  moments.size(), " moments and ", X.size(), " X");
  const MomentRule rule{beta2, eps, parse_eps_at(op, eps_at), keep_norm};
  JobList list(op);
  for (size_t i = 0; i < X.size(); ++i) {
    list.add(i, X[i], X[i], rows ? &moments[i] : nullptr, rows ? nullptr : &moments[i]);
  }
  AxisScaling<MomentRule>(list.jobs(), rows, rule).run();
}

}  // namespace orthonorm
