// First include of every source: pins the stable ABI and carries what every kernel file needs.
#pragma once

// One library serves every torch >= 2.10: only what its stable headers had then.
#define TORCH_TARGET_VERSION 0x020a000000000000

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

namespace orthonorm {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

// A (batch of) matrices in memory: `batch` blocks of rows x cols, each element reached by strides.
struct MatrixView {
  void* data;
  ScalarType dtype;
  int64_t batch, rows, cols;
  int64_t stride_batch, stride_row, stride_col;

  int64_t numel() const { return batch * rows * cols; }
};

// Whether the leading dimensions of `t` collapse into one batch stride (trivially, if it is empty).
inline bool collapses(const Tensor& t) {
  int64_t inner = -1;  // the innermost batch dimension with more than one entry seen so far
  for (int64_t d = t.dim() - 3; d >= 0 && t.numel() != 0; --d) {
    if (t.size(d) == 1) continue;
    if (inner >= 0 && t.stride(d) != t.stride(inner) * t.size(inner)) return false;
    inner = d;
  }
  return true;
}

// The stride between matrices of a batch whose dimensions collapse.
inline int64_t batch_stride(const Tensor& t) {
  for (int64_t d = t.dim() - 3; d >= 0; --d) {
    if (t.size(d) != 1) return t.stride(d);
  }
  return 0;
}

// The view of a tensor with at least two dimensions whose batch dimensions collapse.
inline MatrixView view(const Tensor& t) {
  const int64_t dim = t.dim();
  STD_TORCH_CHECK(dim >= 2, "orthonorm: a matrix needs two dimensions, got ", dim);
  STD_TORCH_CHECK(collapses(t), "orthonorm: batch dimensions must share one stride");
  int64_t batch = 1;
  for (int64_t d = 0; d + 2 < dim; ++d) batch *= t.size(d);
  return {t.data_ptr(),      t.scalar_type(),
          batch,             t.size(dim - 2),
          t.size(dim - 1),   batch_stride(t),
          t.stride(dim - 2), t.stride(dim - 1)};
}

// A 0-d or one-element tensor's number; the tensor is on the CPU.
inline double item(const Tensor& t, int64_t index = 0) {
  STD_TORCH_CHECK(index < t.numel(), "orthonorm: index ", index, " of ", t.numel(), " numbers");
  const int64_t at = t.dim() == 0 ? 0 : index * t.stride(0);
  switch (t.scalar_type()) {
    case ScalarType::Double: return static_cast<const double*>(t.data_ptr())[at];
    case ScalarType::Float: return static_cast<const float*>(t.data_ptr())[at];
    case ScalarType::BFloat16: return static_cast<const BFloat16*>(t.data_ptr())[at];
    case ScalarType::Half: return static_cast<const Half*>(t.data_ptr())[at];
    default: STD_TORCH_CHECK(false, "orthonorm: numbers are floating-point tensors");
  }
}

// Runs f(begin, end) over [0, n) on torch's own threads, at least `grain` items each.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, n, grain, f);
}

}  // namespace orthonorm
