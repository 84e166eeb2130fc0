#include "cluster_gram_polynomial.h"

#include "op.h"

namespace orthonorm::cuda {
namespace {

constexpr const char* OP = "gram_polynomial";

Tensor gram_polynomial(const Tensor& R, const std::vector<double>& coefficients) {
  const Tensor out = torch::stable::empty(R.sizes(), R.scalar_type(), std::nullopt, R.device());
  const TensorList from{R}, to{out};
  Call call(OP, {{"R", from, false}, {"out", to, true}});
  call.same_shapes(2);
  const Strided& r = call(0, 0);
  const int64_t n = r.sizes[r.dim - 1];
  STD_TORCH_CHECK(r.sizes[r.dim - 2] == n && n <= SmallLists::most_of_cluster, OP,
                  ": R must be square with sides of at most 512, got ", shape_of(r));
  STD_TORCH_CHECK(r.type == Element::f16 || r.type == Element::bf16, OP,
                  ": R must be float16 or bfloat16");
  const SmallPolynomial polynomial(OP, coefficients);
  call.run([&](const Device& device) {
    const auto run = [&](SmallLists lists) {
      lists.add(r, call(1, 0).data);
      lists.finish();
    };
    if (r.type == Element::f16) {
      run(gram_polynomial_lists<Fp16>(device, polynomial));
    } else {
      run(gram_polynomial_lists<Bf16>(device, polynomial));
    }
  });
  return out;
}

}  // namespace

ORTHONORM_CUDA_PART(gram_polynomial, "(Tensor R, float[] coefficients) -> Tensor")

}  // namespace orthonorm::cuda
