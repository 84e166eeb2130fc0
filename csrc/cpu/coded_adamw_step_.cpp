#include "../coded_adamw_step.h"

#include "adamw_counts.h"
#include "elementwise.h"

namespace orthonorm {
namespace {

constexpr const char* OP = "coded_adamw_step_";

// The scales of a part's blocks.
struct ScaleRow {
  char* data;
  ScalarType dtype;
  int64_t stride;

  char* at(int64_t block) const { return data + block * stride * element_size(dtype); }
  float get(int64_t block) const {
    float scale;
    load_into(at(block), dtype, 1, 1, &scale);
    return scale;
  }
  void set(int64_t block, float scale) const { store(&scale, at(block), dtype, 1, 1); }
};

void check_scales(const char* name, size_t i, const Facts& s, const Facts& x, int64_t batch_dims) {
  const int64_t count = std::accumulate(x.sizes + batch_dims, x.sizes + x.dim, int64_t{1},
                                        std::multiplies<>());
  STD_TORCH_CHECK(floating(s.dtype) && s.dim == batch_dims + 1 &&
                      std::equal(x.sizes, x.sizes + batch_dims, s.sizes) &&
                      s.sizes[batch_dims] == (count + code_block - 1) / code_block,
                  OP, ": ", name, "[", i, "] must have a number for each ", code_block,
                  " elements of params[", i, "] ", x.shape(), ", got shape ", s.shape());
  STD_TORCH_CHECK(!s.expanded(), OP, ": ", name, "[", i, "] is written and must not be expanded");
}

// The scales of every part of the pass. Parts are what the leading dimensions of exp_avg_scales
// leave, which the pass has checked.
std::vector<ScaleRow> scale_rows(const char* name, const TensorList& scales,
                                 const TensorList& params, const TensorList& exp_avg_scales) {
  std::vector<ScaleRow> made;
  for (size_t i = 0; i < scales.size(); ++i) {
    const Facts s(scales[i]);
    const int64_t batch_dims = exp_avg_scales[i].dim() - 1;
    check_scales(name, i, s, Facts(params[i]), batch_dims);
    const int64_t batch = std::accumulate(s.sizes, s.sizes + batch_dims, int64_t{1},
                                          std::multiplies<>());
    for (int64_t b = 0; b < batch; ++b) {
      int64_t offset = 0;
      for (int64_t d = batch_dims, rest = b; d-- > 0; rest /= s.sizes[d]) {
        offset += rest % s.sizes[d] * s.strides[d];
      }
      made.push_back({s.data + offset * element_size(s.dtype), s.dtype, s.strides[batch_dims]});
    }
  }
  return made;
}

void coded_adamw_step_(const TensorList& params, const TensorList& grads,
                       const TensorList& exp_avg, const TensorList& exp_avg_sq,
                       const TensorList& exp_avg_scales, const TensorList& exp_avg_sq_scales,
                       const TensorList& steps, const Tensor& lr, double beta1, double beta2,
                       double eps, const Tensor& weight_decay, bool decay_first, bool correct_eps,
                       const std::optional<Tensor>& rounding,
                       const std::optional<Tensor>& grad_scale,
                       const std::optional<Tensor>& found_inf) {
  STD_TORCH_CHECK(exp_avg_scales.size() == params.size() &&
                      exp_avg_sq_scales.size() == params.size(),
                  OP, ": lists must have equal lengths, got ", params.size(), " params, ",
                  exp_avg_scales.size(), " exp_avg_scales and ", exp_avg_sq_scales.size(),
                  " exp_avg_sq_scales");
  const Pass<4> pass(OP, Unit::blocks,
                     {{{"params", params, Use::update},
                       {"grads", grads, Use::read},
                       {"exp_avg", exp_avg, Use::update, ScalarType::Byte},
                       {"exp_avg_sq", exp_avg_sq, Use::update, ScalarType::Byte}}},
                     rounding, &exp_avg_scales);
  const auto rows = [&](const char* name, const TensorList& scales) {
    return scale_rows(name, scales, params, exp_avg_scales);
  };
  const std::vector<ScaleRow> first = rows("exp_avg_scales", exp_avg_scales);
  const std::vector<ScaleRow> second = rows("exp_avg_sq_scales", exp_avg_sq_scales);
  check_steps(OP, steps, params.size());
  if (item_or(0, found_inf) != 0) return;
  const std::vector<AdamWStep<double>> made =
      advance(steps, {item(lr), beta1, beta2, eps, item(weight_decay), decay_first, correct_eps,
                      item_or(1, grad_scale)});
  pass.run([&]<class A>(const Part<4>& part, int64_t begin, const std::array<A*, 4>& at,
                        int64_t count) {
    const AdamWStep<A> c(made[part.entry]);
    const int64_t index = &part - pass.parts().data();
    const ScaleRow &m = first[index], &v = second[index];
    std::array<BlockScales, Pass<4>::chunk / code_block> scales;
    const int64_t block = begin / code_block, blocks = (count + code_block - 1) / code_block;
    for (int64_t i = 0; i < blocks; ++i) scales[i] = {m.get(block + i), v.get(block + i)};
    specialized([&, at, count] {
      for (int64_t i = 0; i < count; i += code_block) {
        coded_adamw_step(c, at[0] + i, at[1] + i, at[2] + i, at[3] + i, scales[i / code_block],
                         std::min(code_block, count - i));
      }
    });
    for (int64_t i = 0; i < blocks; ++i) {
      m.set(block + i, scales[i].exp_avg);
      v.set(block + i, scales[i].exp_avg_sq);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("coded_adamw_step_", TORCH_BOX(&coded_adamw_step_));
}

}  // namespace orthonorm
