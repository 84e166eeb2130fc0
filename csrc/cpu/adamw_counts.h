// Step counts of AdamW on the CPU, and what a step makes of them.
#pragma once

#include <string>
#include <vector>

#include "../adamw_step.h"
#include "convert.h"

namespace orthonorm {

inline void check_steps(const char* op, const TensorList& steps, size_t count) {
  STD_TORCH_CHECK(steps.size() == count, op, ": lists must have equal lengths, got ", count,
                  " params and ", steps.size(), " steps");
  for (const Tensor& step : steps) {
    STD_TORCH_CHECK(step.numel() == 1, op, ": steps must have one element, got ", step.numel());
    const ScalarType dtype = step.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                    ": steps must be float32 or float64");
  }
}

// Adds 1 to every step count and returns what each parameter's step multiplies by. The powers are
// taken once for a run of equal counts, the usual case.
inline std::vector<AdamWStep<double>> advance(const TensorList& steps, const AdamWRule& rule) {
  std::vector<AdamWStep<double>> made;
  made.reserve(steps.size());
  double last = -1;
  for (const Tensor& step : steps) {
    if (step.scalar_type() == ScalarType::Double) {
      *static_cast<double*>(step.data_ptr()) += 1;
    } else {
      *static_cast<float*>(step.data_ptr()) += 1;
    }
    const double t = item(step);
    if (made.empty() || t != last) {
      made.emplace_back(rule, t);
    } else {
      made.push_back(made.back());
    }
    last = t;
  }
  return made;
}

}  // namespace orthonorm
