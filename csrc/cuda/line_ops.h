// Moments and norms of rows and columns, as the ops have them: their kernels are compiled once.
#pragma once

#include "line_rule.h"
#include "op.h"

namespace orthonorm::cuda {

EpsAt eps_at(const char* op, const std::string& name);

// The moments of rows, of columns or of both: those that are given, in the call after X.
void moments(Call& call, const LineRule& rule, bool rows, bool columns);

Tensor normalized(const char* op, const Tensor& X, bool rows, double scale, double eps,
                  const std::string& at);

}  // namespace orthonorm::cuda
