// power_iteration_: tensors as matrices and vectors of the schedule in ../power_schedule.h.
#include "../power_schedule.h"

#include <string>

#include "layout.h"

namespace orthonorm {
namespace {

constexpr const char* OP = "power_iteration_";

// A vector in memory.
struct Vector {
  char* data;
  ScalarType dtype;
  int64_t count, stride;
};

power::Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return power::Element::f64;
    case ScalarType::BFloat16: return power::Element::bf16;
    case ScalarType::Half: return power::Element::f16;
    default: return power::Element::f32;
  }
}

// The lists as matrices; also what the iteration reads and writes.
class Lists {
 public:
  Lists(const TensorList& W, const TensorList& u, const TensorList& v, const power::Rule& u_first)
      : rule_(u_first) {
    STD_TORCH_CHECK(W.size() == u.size() && W.size() == v.size(), OP,
                    ": lists must have equal lengths, got ", W.size(), ", ", u.size(), " and ",
                    v.size());
    for (size_t i = 0; i < W.size(); ++i) add(i, Facts(W[i]), Facts(u[i]), Facts(v[i]));
    sigmas_.resize(count_);
  }

  const std::vector<power::Matrix>& matrices() const { return matrices_; }

  Tensor sigma() const {
    const ScalarType dtype = is_double_ ? ScalarType::Double : ScalarType::Float;
    Tensor result = torch::stable::empty({count_}, dtype);
    orthonorm::store(sigmas_.data(), result.data_ptr(), dtype, 1, count_);
    return result;
  }

  template <class A>
  void load(int64_t matrix, power::Side side, A* to) const {
    const Vector& x = vector(matrix, side);
    load_into(x.data, x.dtype, x.stride, x.count, to);
  }
  template <class A>
  void store(int64_t matrix, power::Side side, const A* from) const {
    const Vector& x = vector(matrix, side);
    orthonorm::store(from, x.data, x.dtype, x.stride, x.count);
  }
  void sigma(int64_t matrix, double value) const { sigmas_[places_[matrix]] = value; }

 private:
  void check(size_t i, const Facts& w, const Facts& u, const Facts& v) const {
    STD_TORCH_CHECK(w.dim >= 2, OP, ": W[", i, "] must have at least 2 dimensions, got shape ",
                    w.shape());
    STD_TORCH_CHECK(floating(w.dtype) && floating(u.dtype) && floating(v.dtype), OP,
                    ": tensors must be float32, float64, bfloat16 or float16");
    check_vector(i, "u", u, w, w.sizes[w.dim - 2]);
    check_vector(i, "v", v, w, w.sizes[w.dim - 1]);
  }

  static void check_vector(size_t i, const char* name, const Facts& x, const Facts& w,
                           int64_t count) {
    STD_TORCH_CHECK(x.dim == w.dim - 1 && std::equal(x.sizes, x.sizes + x.dim - 1, w.sizes) &&
                        x.sizes[x.dim - 1] == count,
                    OP, ": ", name, "[", i, "] must be one vector for each matrix of W[", i,
                    "] with shape ", w.shape(), ", got shape ", x.shape());
    STD_TORCH_CHECK(!x.expanded(), OP, ": ", name, "[", i,
                    "] is written and must not be an expanded tensor");
  }

  void add(size_t i, const Facts& w, const Facts& u, const Facts& v) {
    check(i, w, u, v);
    const int64_t rows = w.sizes[w.dim - 2], cols = w.sizes[w.dim - 1];
    int64_t batch = 1;
    for (int64_t d = 0; d < w.dim - 2; ++d) batch *= w.sizes[d];
    is_double_ = is_double_ || w.dtype == ScalarType::Double;
    for (int64_t b = 0; b < batch && rows > 0 && cols > 0; ++b) {
      power::Source source{at(w, b, w), element_of(w.dtype), w.strides[w.dim - 2],
                           w.strides[w.dim - 1]};
      add(count_ + b, source, {at(u, b, w), u.dtype, rows, u.strides[u.dim - 1]},
          {at(v, b, w), v.dtype, cols, v.strides[v.dim - 1]});
    }
    count_ += batch;
  }

  // Columns become what is short-strided: a transposed W swaps the vectors and the order.
  void add(int64_t place, power::Source source, Vector u, Vector v) {
    power::Rule rule = rule_;
    const bool swap = v.count == 1 || (u.count > 1 && source.row_stride < source.col_stride);
    if (swap) {
      std::swap(u, v);
      std::swap(source.row_stride, source.col_stride);
      rule.left_first = !rule.left_first;
    }
    if (v.count == 1) source.col_stride = 1;
    matrices_.push_back({source, u.count, v.count, rule});
    places_.push_back(place);
    left_.push_back(u);
    right_.push_back(v);
  }

  // Where matrix b of the batch of `w` starts in `t`, which has the same leading dimensions.
  static char* at(const Facts& t, int64_t b, const Facts& w) {
    int64_t offset = 0;
    for (int64_t d = w.dim - 2; d-- > 0; b /= w.sizes[d]) offset += b % w.sizes[d] * t.strides[d];
    return t.data + offset * element_size(t.dtype);
  }

  const Vector& vector(int64_t matrix, power::Side side) const {
    return (side == power::Side::left ? left_ : right_)[matrix];
  }

  const power::Rule rule_;
  bool is_double_ = false;
  int64_t count_ = 0;  // sigmas
  std::vector<power::Matrix> matrices_;
  std::vector<int64_t> places_;
  std::vector<Vector> left_, right_;
  mutable std::vector<double> sigmas_;  // one writer each
};

Tensor power_iteration_(const TensorList& W, const TensorList& u, const TensorList& v,
                        int64_t steps, const std::string& order, double eps) {
  STD_TORCH_CHECK(steps >= 0, OP, ": steps must be at least 0, got ", steps);
  STD_TORCH_CHECK(order == "u_first" || order == "v_first", OP,
                  ": order must be one of 'u_first', 'v_first', got '", order, "'");
  STD_TORCH_CHECK(eps >= 0, OP, ": eps must be in [0, inf], got ", eps);
  const Lists lists(W, u, v, {steps, order == "u_first", eps});
  const auto team = [](int64_t n, const auto& f) {
    parallel(n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) f(t);
    });
  };
  power::iterate(lists.matrices(), lists, torch::stable::get_num_threads(), team, isa());
  return lists.sigma();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("power_iteration_", TORCH_BOX(&power_iteration_));
}

}  // namespace orthonorm
