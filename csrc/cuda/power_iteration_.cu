#include "power_lists.h"

#include "op.h"

namespace orthonorm::cuda {
namespace {

constexpr const char* OP = "power_iteration_";

// x holds a vector of `count` numbers for every matrix of w.
void check_vectors(const char* name, size_t i, const Strided& x, const Strided& w, int64_t count) {
  const bool fits = x.dim == w.dim - 1 && std::equal(x.sizes, x.sizes + x.dim - 1, w.sizes) &&
                    x.sizes[x.dim - 1] == count;
  STD_TORCH_CHECK(fits, OP, ": ", name, "[", i, "] must be one vector for each matrix of W[", i,
                  "] with shape ", shape_of(w), ", got shape ", shape_of(x));
}

Tensor power_iteration_(const TensorList& W, const TensorList& u, const TensorList& v,
                        int64_t steps, const std::string& order, double eps) {
  STD_TORCH_CHECK(steps >= 0, OP, ": steps must be at least 0, got ", steps);
  STD_TORCH_CHECK(order == "u_first" || order == "v_first", OP,
                  ": order must be one of 'u_first', 'v_first', got '", order, "'");
  STD_TORCH_CHECK(eps >= 0, OP, ": eps must be in [0, inf], got ", eps);
  Call call(OP, {{"W", W, false}, {"u", u, true}, {"v", v, true}});
  int64_t count = 0;
  ScalarType dtype = ScalarType::Float;
  for (size_t i = 0; i < call.size(); ++i) {
    const Strided& w = call(0, i);
    STD_TORCH_CHECK(w.dim >= 2, OP, ": W[", i, "] must have at least 2 dimensions, got shape ",
                    shape_of(w));
    check_vectors("u", i, call(1, i), w, w.sizes[w.dim - 2]);
    check_vectors("v", i, call(2, i), w, w.sizes[w.dim - 1]);
    count += matrices(w);
    if (w.type == Element::f64) dtype = ScalarType::Double;
  }
  const auto on = call.size() ? std::optional(W[0].device()) : std::nullopt;
  Tensor sigmas = torch::stable::empty({count}, dtype, std::nullopt, on);
  torch::stable::zero_(sigmas);  // those of empty matrices stay
  call.run([&](const Device& device) {
    PowerLists lists(device, {steps, eps}, static_cast<char*>(sigmas.data_ptr()),
                     element_of(OP, "sigma", dtype));
    for (size_t i = 0; i < call.size(); ++i) {
      lists.add(call(0, i), call(1, i), call(2, i), order == "v_first");
    }
    lists.finish();
  });
  return sigmas;
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("power_iteration_", TORCH_BOX(&power_iteration_)); }

}  // namespace orthonorm::cuda
