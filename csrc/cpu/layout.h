// How tensors of one shape lie in memory: read once, put into one order of traversal.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "../orthonorm.h"
#include "convert.h"

namespace orthonorm {

// A tensor's facts. Every accessor is a call through the C ABI, and lists are long.
struct Facts {
  char* data;
  ScalarType dtype;
  int64_t dim;
  const int64_t *sizes, *strides;  // the tensor's own

  explicit Facts(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        dtype(t.scalar_type()),
        dim(t.dim()),
        sizes(t.sizes().data()),
        strides(t.strides().data()) {}

  bool same_shape(const Facts& other) const {
    return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes);
  }

  bool empty() const { return std::find(sizes, sizes + dim, 0) != sizes + dim; }

  // Whether two indices mean the same element, as in an expanded tensor.
  bool expanded() const {
    if (empty()) return false;
    for (int64_t d = 0; d < dim; ++d) {
      if (strides[d] == 0 && sizes[d] > 1) return true;
    }
    return false;
  }

  // Whether the last `dims` dimensions are packed in their order.
  bool contiguous(int64_t dims) const {
    int64_t packed = 1;
    for (int64_t d = dim; d-- > dim - dims;) {
      if (sizes[d] != 1 && strides[d] != packed) return false;
      packed *= sizes[d];
    }
    return true;
  }

  std::string shape() const {
    std::ostringstream text;
    text << "(";
    for (int64_t d = 0; d < dim; ++d) text << (d ? ", " : "") << sizes[d];
    text << ")";
    return text.str();
  }
};

// The last `dims` dimensions of N tensors of one shape, outermost first: sorted so that as many of
// them as possible are walked in memory order, or left in their own order; and merged where all of
// them allow it.
template <int N>
class Layout {
 public:
  Layout(const std::array<Facts, N>& tensors, int64_t dims, bool sorted = true) {
    if (!sorted) {
      for (int64_t d = tensors[0].dim - dims; d < tensors[0].dim; ++d) {
        if (tensors[0].sizes[d] != 1) append(tensors, d);
      }
      complete();
      return;
    }
    int most = -1;
    for (int leader = 0; leader < N; ++leader) {
      Layout candidate(tensors, dims, tensors[leader]);
      int linear = 0;
      for (int k = 0; k < N; ++k) linear += candidate.linear(k);
      if (linear > most) most = linear, *this = std::move(candidate);
    }
  }

  // Whether element i of the traversal lies i elements behind the first one of tensor k.
  bool linear(int k) const {
    int64_t packed = 1;
    for (size_t d = sizes_.size(); d-- > 0;) {
      if (strides_[d][k] != packed) return false;
      packed *= sizes_[d];
    }
    return true;
  }

  // Calls f(offset, stride, done, length) for each run of elements [begin, begin + count) of the
  // traversal: `length` elements of tensor k from `offset`, `done` elements into the range.
  template <class F>
  void runs(int k, int64_t begin, int64_t count, const F& f) const {
    const int64_t inner = sizes_.back(), stride = strides_.back()[k];
    for (int64_t done = 0; done < count;) {
      int64_t rest = (begin + done) / inner, column = (begin + done) % inner;
      int64_t offset = column * stride;
      for (size_t d = sizes_.size() - 1; d-- > 0; rest /= sizes_[d]) {
        offset += rest % sizes_[d] * strides_[d][k];
      }
      const int64_t length = std::min(count - done, inner - column);
      f(offset, stride, done, length);
      done += length;
    }
  }

 private:
  Layout(const std::array<Facts, N>& tensors, int64_t dims, const Facts& leader) {
    std::vector<int64_t> order;
    for (int64_t d = leader.dim - dims; d < leader.dim; ++d) {
      if (leader.sizes[d] != 1) order.push_back(d);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return leader.strides[a] > leader.strides[b];
    });
    for (const int64_t d : order) append(tensors, d);
    complete();
  }

  void complete() {
    if (sizes_.empty()) sizes_.push_back(1), strides_.emplace_back().fill(1);
  }

  void append(const std::array<Facts, N>& tensors, int64_t d) {
    const int64_t size = tensors[0].sizes[d];
    bool merges = !sizes_.empty();
    for (int k = 0; merges && k < N; ++k) {
      merges = strides_.back()[k] == tensors[k].strides[d] * size;
    }
    if (!merges) sizes_.push_back(1), strides_.emplace_back();
    sizes_.back() *= size;
    for (int k = 0; k < N; ++k) strides_.back()[k] = tensors[k].strides[d];
  }

  std::vector<int64_t> sizes_;
  std::vector<std::array<int64_t, N>> strides_;
};

}  // namespace orthonorm
