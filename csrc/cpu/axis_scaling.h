// Every row (or column) of a matrix multiplied by a number made of its sum of squares: what
// `row_moment_`, `column_moment_`, `row_normalize` and `column_normalize` do.
#pragma once

#include "moment_jobs.h"

namespace orthonorm {

// What becomes of a sum of squares s of n elements.
struct AxisRule {
  // decay: the moment v <- beta2 v + (1-beta2) s / n is written, the factor is 1 / sqrt(v).
  // otherwise the factor is 1 / (scale sqrt(s)). Both with eps.
  bool decay;
  double beta2, scale, eps;
  EpsAt at;
  bool keep_norm;  // each matrix is rescaled to the norm it had; only with decay

  // Norms fit where squares do not: no scale of X is too small or too large for them.
  bool from_norms() const { return !decay; }
  // The product with an inverse is rounded twice, which float64 would notice.
  bool divides(ScalarType dtype) const { return !decay && dtype == ScalarType::Double; }

  // The factors (or divisors) of `count` runs along a dimension from their norms or squares.
  void factors(const Job& job, bool outer, int64_t first, int64_t count, const double* values,
               double* factors) const;
};

// Rows or columns of every job; X is read once for the sums and once to be scaled.
void scale_axis(const std::vector<Job>& jobs, bool rows, const AxisRule& rule);

void axis_moment(const char* op, const TensorList& moments, const TensorList& X, bool rows,
                 double beta2, double eps, const std::string& eps_at, bool keep_norm);

Tensor axis_normalize(const char* op, const Tensor& X, bool rows, double scale, double eps,
                      const std::string& eps_at);

}  // namespace orthonorm
