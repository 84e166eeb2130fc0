#include "small_newton_schulz.h"

#include "op.h"

namespace orthonorm::cuda {
namespace {

constexpr const char* OP = "small_newton_schulz";

TensorList small_newton_schulz(const TensorList& X, const std::vector<double>& coefficients,
                               ScalarType dtype, bool scale, double eps, double safety,
                               const std::optional<Tensor>& norms) {
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, OP,
                  ": dtype must be float16 or bfloat16");
  TensorList out;
  for (const Tensor& x : X) {
    out.push_back(torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device()));
  }
  Call call(OP, {{"X", X, false}, {"out", out, true}});
  call.same_shapes(2);
  int64_t count = 0;
  for (size_t i = 0; i < call.size(); ++i) {
    const Strided& x = call(0, i);
    STD_TORCH_CHECK(x.type != Element::f64, OP, ": X[", i, "] must not be float64");
    STD_TORCH_CHECK(std::max(x.sizes[x.dim - 2], x.sizes[x.dim - 1]) <= SmallLists::most_side, OP,
                    ": X[", i, "] must have sides of at most 128, got ", shape_of(x));
    count += matrices(x);
  }
  const SmallPolynomial polynomial(OP, coefficients);
  SmallScaling scaling{scale, eps, safety, norms.has_value(), 0.0};
  if (norms) {
    STD_TORCH_CHECK(norms->dim() == 1 && norms->numel() == count, OP, ": norms must be 1-D with ",
                    count, " numbers, got ", shape_of(strided(OP, "norms", *norms)));
    scaling.norms = call.numbers("norms", *norms);
  }
  call.run([&](const Device& device) {
    const auto run = [&](SmallLists lists) {
      for (size_t i = 0; i < call.size(); ++i) lists.add(call(0, i), call(1, i).data);
      lists.finish();
    };
    if (dtype == ScalarType::Half) {
      run(small_newton_schulz_lists<Fp16>(device, polynomial, scaling));
    } else {
      run(small_newton_schulz_lists<Bf16>(device, polynomial, scaling));
    }
  });
  return out;
}

}  // namespace

ORTHONORM_CUDA_PART(small_newton_schulz,
                    "(Tensor[] X, float[] coefficients, ScalarType dtype, bool scale=True, "
                    "float eps=0.0, float safety=1.0, Tensor? norms=None) -> Tensor[]")

}  // namespace orthonorm::cuda
