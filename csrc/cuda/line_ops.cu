#include "line_ops.h"

#include "line_lists.h"

namespace orthonorm::cuda {
namespace {

// Moments that there are not.
inline Strided absent(const Strided& like) {
  return {nullptr, like.type, like.dim, like.sizes, like.strides};
}

}  // namespace

EpsAt eps_at(const char* op, const std::string& name) {
  if (name == "outside") return EpsAt::outside;
  if (name == "inside") return EpsAt::inside;
  STD_TORCH_CHECK(name == "clamp", op,
                  ": eps_at must be one of 'outside', 'inside', 'clamp', got '", name, "'");
  return EpsAt::clamp;
}

void moments(Call& call, const LineRule& rule, bool rows, bool columns) {
  call.lines(rows, columns);
  call.run([&](const Device& device) {
    LineLists lists(device, rule, rows, columns);
    for (size_t i = 0; i < call.size(); ++i) {
      const Strided &x = call(0, i), none = absent(x);
      lists.add({x, x, {rows ? call(1, i) : none, columns ? call(rows ? 2 : 1, i) : none}});
    }
    lists.finish();
  });
}

Tensor normalized(const char* op, const Tensor& X, bool rows, double scale, double eps,
                         const std::string& at) {
  const Tensor out = torch::stable::empty(X.sizes(), X.scalar_type(), std::nullopt, X.device());
  const TensorList from{X}, to{out};
  Call call(op, {{"X", from, false}, {"out", to, true}});
  call.same_shapes(2);
  const LineRule rule{0, eps, scale, eps_at(op, at), false, false, false};
  call.run([&](const Device& device) {
    LineLists lists(device, rule, rows, !rows);
    const Strided &x = call(0, 0), none = absent(x);
    lists.add({x, call(1, 0), {none, none}});
    lists.finish();
  });
  return out;
}

}  // namespace orthonorm::cuda
