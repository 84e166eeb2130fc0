// Ops on a batch of half matrices that stay on chip through a whole polynomial.
#pragma once

#include "op.h"
#include "small_lists.h"

namespace orthonorm::cuda {

using ListsOf = SmallLists(const Device&, const SmallPolynomial&);

// What the lists for its type make of X, whose sides they have room for.
inline Tensor polynomial_of(const char* op, const char* name, const Tensor& X,
                            const std::vector<double>& coefficients, bool square, ListsOf* of_fp16,
                            ListsOf* of_bf16) {
  const Tensor out = torch::stable::empty(X.sizes(), X.scalar_type(), std::nullopt, X.device());
  const TensorList from{X}, to{out};
  Call call(op, {{name, from, false}, {"out", to, true}});
  call.same_shapes(2);
  const Strided& x = call(0, 0);
  const int64_t m = x.sizes[x.dim - 2], n = x.sizes[x.dim - 1];
  constexpr int most = SmallLists::most_of_cluster;
  STD_TORCH_CHECK(std::max(m, n) <= most && (m == n || !square), op, ": ", name, " must ",
                  square ? "be square and " : "", "have sides of at most ", most, ", got ",
                  shape_of(x));
  STD_TORCH_CHECK(x.type == Element::f16 || x.type == Element::bf16, op, ": ", name,
                  " must be float16 or bfloat16");
  const SmallPolynomial polynomial(op, coefficients);
  call.run([&](const Device& device) {
    SmallLists lists = (x.type == Element::f16 ? of_fp16 : of_bf16)(device, polynomial);
    lists.add(x, call(1, 0).data);
    lists.finish();
  });
  return out;
}

}  // namespace orthonorm::cuda
