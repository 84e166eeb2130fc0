// Lists of tensors as matrices and vectors of the schedule in ../power_schedule.h.
#pragma once

#include <string>

#include "../power_schedule.h"
#include "layout.h"

namespace orthonorm {

// A vector in memory.
struct Vector {
  char* data;
  ScalarType dtype;
  int64_t count, stride;
};

inline power::Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return power::Element::f64;
    case ScalarType::BFloat16: return power::Element::bf16;
    case ScalarType::Half: return power::Element::f16;
    default: return power::Element::f32;
  }
}

// The lists as matrices; also what the iteration reads and writes.
class PowerLists {
 public:
  // `out`: where W / sigma goes, tensors of the shapes and dtypes of W; or no list.
  PowerLists(const char* op, const TensorList& W, const TensorList& u, const TensorList& v,
             const TensorList* out, int64_t steps, const std::string& order, double eps)
      : op_(op), rule_{steps, order == "u_first", eps} {
    STD_TORCH_CHECK(steps >= 0, op, ": steps must be at least 0, got ", steps);
    STD_TORCH_CHECK(order == "u_first" || order == "v_first", op,
                    ": order must be one of 'u_first', 'v_first', got '", order, "'");
    STD_TORCH_CHECK(eps >= 0, op, ": eps must be in [0, inf], got ", eps);
    STD_TORCH_CHECK(W.size() == u.size() && W.size() == v.size(), op,
                    ": lists must have equal lengths, got ", W.size(), ", ", u.size(), " and ",
                    v.size());
    STD_TORCH_CHECK(out == nullptr || out->size() == W.size(), op,
                    ": out must have the length of W, ", W.size(), ", got ",
                    out == nullptr ? 0 : out->size());
    for (size_t i = 0; i < W.size(); ++i) {
      const Facts w(W[i]), to(out == nullptr ? W[i] : (*out)[i]);
      if (out != nullptr) check_out(i, to, w);
      add(i, w, Facts(u[i]), Facts(v[i]), out == nullptr ? nullptr : &to);
    }
    sigmas_.resize(count_);
  }

  void iterate() const {
    const auto team = [](int64_t n, const auto& f) {
      parallel(n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) f(t);
      });
    };
    power::iterate(matrices_, *this, torch::stable::get_num_threads(), team, isa());
  }

  // Of `sigma` and `vectors`.
  ScalarType dtype() const { return is_double_ ? ScalarType::Double : ScalarType::Float; }

  Tensor sigma() const {
    Tensor result = torch::stable::empty({count_}, dtype());
    orthonorm::store(sigmas_.data(), result.data_ptr(), dtype(), 1, count_);
    return result;
  }

  // u and v of every matrix as they are now: u_1, v_1, u_2, ...
  Tensor vectors() const {
    int64_t length = 0;
    for (const Vector& x : vectors_) length += x.count;
    Tensor result = torch::stable::empty({length}, dtype());
    is_double_ ? gather_vectors<double>(result) : gather_vectors<float>(result);
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
  template <class A>
  void gather_vectors(Tensor& result) const {
    A* to = static_cast<A*>(result.data_ptr());
    for (const Vector& x : vectors_) {
      load_into(x.data, x.dtype, x.stride, x.count, to);
      to += x.count;
    }
  }

  void check(size_t i, const Facts& w, const Facts& u, const Facts& v) const {
    STD_TORCH_CHECK(w.dim >= 2, op_, ": W[", i, "] must have at least 2 dimensions, got shape ",
                    w.shape());
    STD_TORCH_CHECK(floating(w.dtype) && floating(u.dtype) && floating(v.dtype), op_,
                    ": tensors must be float32, float64, bfloat16 or float16");
    check_vector(i, "u", u, w, w.sizes[w.dim - 2]);
    check_vector(i, "v", v, w, w.sizes[w.dim - 1]);
  }

  void check_vector(size_t i, const char* name, const Facts& x, const Facts& w,
                    int64_t count) const {
    STD_TORCH_CHECK(x.dim == w.dim - 1 && std::equal(x.sizes, x.sizes + x.dim - 1, w.sizes) &&
                        x.sizes[x.dim - 1] == count,
                    op_, ": ", name, "[", i, "] must be one vector for each matrix of W[", i,
                    "] with shape ", w.shape(), ", got shape ", x.shape());
    STD_TORCH_CHECK(!x.expanded(), op_, ": ", name, "[", i,
                    "] is written and must not be an expanded tensor");
  }

  void check_out(size_t i, const Facts& out, const Facts& w) const {
    STD_TORCH_CHECK(out.same_shape(w) && out.dtype == w.dtype, op_, ": out[", i,
                    "] must have the shape and dtype of W[", i, "] ", w.shape(), ", got ",
                    out.shape());
    STD_TORCH_CHECK(!out.expanded(), op_, ": out[", i,
                    "] is written and must not be an expanded tensor");
  }

  void add(size_t i, const Facts& w, const Facts& u, const Facts& v, const Facts* out) {
    check(i, w, u, v);
    const int64_t rows = w.sizes[w.dim - 2], cols = w.sizes[w.dim - 1];
    int64_t batch = 1;
    for (int64_t d = 0; d < w.dim - 2; ++d) batch *= w.sizes[d];
    is_double_ = is_double_ || w.dtype == ScalarType::Double;
    for (int64_t b = 0; b < batch; ++b) {
      const Vector left{at(u, b, w), u.dtype, rows, u.strides[u.dim - 1]};
      const Vector right{at(v, b, w), v.dtype, cols, v.strides[v.dim - 1]};
      vectors_.push_back(left), vectors_.push_back(right);
      if (rows == 0 || cols == 0) continue;
      power::Source source{at(w, b, w), element_of(w.dtype), w.strides[w.dim - 2],
                           w.strides[w.dim - 1]};
      power::Target target;
      if (out != nullptr) {
        target = {at(*out, b, w), out->strides[w.dim - 2], out->strides[w.dim - 1]};
      }
      add(count_ + b, source, target, left, right);
    }
    count_ += batch;
  }

  // Columns become what is short-strided: a transposed W swaps the vectors and the order.
  void add(int64_t place, power::Source source, power::Target out, Vector u, Vector v) {
    power::Rule rule = rule_;
    const bool swap = v.count == 1 || (u.count > 1 && source.row_stride < source.col_stride);
    if (swap) {
      std::swap(u, v);
      std::swap(source.row_stride, source.col_stride);
      std::swap(out.row_stride, out.col_stride);
      rule.left_first = !rule.left_first;
    }
    if (v.count == 1) source.col_stride = 1;
    matrices_.push_back({source, u.count, v.count, rule, out});
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

  const char* const op_;
  const power::Rule rule_;
  bool is_double_ = false;
  int64_t count_ = 0;  // sigmas
  std::vector<power::Matrix> matrices_;
  std::vector<int64_t> places_;
  std::vector<Vector> left_, right_;  // of matrices_
  std::vector<Vector> vectors_;       // u and v in the order of the lists
  mutable std::vector<double> sigmas_;  // one writer each
};

}  // namespace orthonorm
