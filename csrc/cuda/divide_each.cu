#include "divide_each.h"

#include "op.h"

namespace orthonorm::cuda {
namespace {

Tensor divide_each(const Tensor& X, const Tensor& divisors, ScalarType dtype) {
  const Tensor out = torch::stable::empty(X.sizes(), dtype, std::nullopt, X.device());
  const TensorList from{X}, to{out};
  Call call("divide_each", {{"X", from, false}, {"out", to, true}});
  call.same_shapes(2);
  STD_TORCH_CHECK(divisors.dim() == 1 && divisors.numel() == matrices(call(0, 0)),
                  "divide_each: divisors must be 1-D with ", matrices(call(0, 0)),
                  " numbers, got ", shape_of(strided("divide_each", "divisors", divisors)));
  const DivideEachOp op{call.numbers("divisors", divisors)};
  call.run([&](const Device& device) {
    auto lists = elementwise(device, Unit::matrix, op);
    lists.add(call.item<2>(0));
    lists.finish();
  });
  return out;
}

}  // namespace

ORTHONORM_CUDA_IMPL(m) { m.impl("divide_each", TORCH_BOX(&divide_each)); }

}  // namespace orthonorm::cuda
