// From tensors to the packed products of gemm.h; what gram, symmetric_update and apply share.
//
// As an internal interface for other ops: fill a gemm::Product (any strides, transposes by swapping
// them, D may be the tensor E that it accumulates into) and call `compute`.
#pragma once

#include "../orthonorm.h"

#include "../gemm.h"
#include "convert.h"

namespace orthonorm {

// Compiled once for all ops, in gram.cpp.
extern template void gemm::multiply(
    const Product<float>&, int64_t, const Parallel&, Isa);
extern template void gemm::multiply(
    const Product<double>&, int64_t, const Parallel&, Isa);
extern template void gemm::multiply(
    const Product<Bf16>&, int64_t, const Parallel&, Isa);
extern template void gemm::multiply(
    const Product<Fp16>&, int64_t, const Parallel&, Isa);
extern template void gemm::multiply(
    const Product<Bf16, float>&, int64_t, const Parallel&, Isa);
extern template void gemm::multiply(
    const Product<Fp16, float>&, int64_t, const Parallel&, Isa);

inline const gemm::Parallel torch_threads = [](int64_t n, const gemm::Range& f) {
  parallel(n, 1, f);
};

template <class T, class O>
void compute(const gemm::Product<T, O>& product) {
  gemm::multiply(product, torch::stable::get_num_threads(), torch_threads, isa());
}

// `batch` matrices of `rows` rows and `cols` columns.
struct Sizes {
  int64_t batch, rows, cols;
};

// A = X X^T.
template <class T, class O>
void gram_into(gemm::Strided<const T> X, const Sizes& x, gemm::Strided<O> A) {
  gemm::Product<T, O> p;
  p.batch = x.batch, p.rows = p.cols = x.rows, p.depth = x.cols;
  p.L = X, p.D = A;
  p.symmetric = p.gram = true;
  compute(p);
}

// D = a X + b B X; a is 0 where D has another dtype.
template <class T, class O>
void apply_into(gemm::Strided<const T> X, const Sizes& x, gemm::Strided<const T> B, double a,
                double b, gemm::Strided<O> D) {
  gemm::Product<T, O> p;
  p.batch = x.batch, p.rows = p.depth = x.rows, p.cols = x.cols;
  p.L = B, p.R = X, p.D = D;
  if constexpr (std::is_same_v<T, O>) {
    if (a != 0) p.E = X;
  }
  p.alpha = b, p.beta = a;
  compute(p);
}

// Contiguous matrices.
template <class T>
gemm::Strided<T> packed(T* data, int64_t rows, int64_t cols) {
  return {data, cols, 1, rows * cols};
}

// a, b, c of every iteration, flattened.
inline std::vector<gemm::Triple> triples_of(const char* op, const std::vector<double>& numbers) {
  STD_TORCH_CHECK(!numbers.empty() && numbers.size() % 3 == 0, op,
                  ": coefficients must be (a, b, c) per iteration, got ", numbers.size(),
                  " numbers");
  std::vector<gemm::Triple> triples;
  for (size_t i = 0; i < numbers.size(); i += 3) {
    triples.push_back({numbers[i], numbers[i + 1], numbers[i + 2]});
  }
  return triples;
}

// A tensor whose batch dimensions share one stride: itself, or a copy in the rare other case.
inline Tensor batched(const Tensor& t) {
  return collapses(t) ? t : torch::stable::contiguous(t);
}

template <class T>
gemm::Strided<T> strided(const Tensor& t) {
  const MatrixView v = view(t);
  return {static_cast<T*>(v.data), v.stride_row, v.stride_col, v.stride_batch};
}

// A tensor and its result as matrices of no more rows than columns: both transposed if need be.
template <class T>
struct Wide {
  gemm::Strided<const T> from;
  gemm::Strided<T> to;
  Sizes sizes;
};

template <class T>
Wide<T> short_side_first(const Tensor& X, const Tensor& out) {
  const MatrixView x = view(X);
  const auto from = strided<const T>(X);
  const auto to = strided<T>(out);
  if (x.rows <= x.cols) return {from, to, {x.batch, x.rows, x.cols}};
  const auto turned = [](auto s) { return decltype(s){s.data, s.col, s.row, s.batch}; };
  return {turned(from), turned(to), {x.batch, x.cols, x.rows}};
}

// Elements of X from which on the direct form does not hold it in three packed copies but takes it
// slab by slab: at 8192 x 8192 the copies are 800 MB in float32, and repacking X is a hundredth of
// the products.
inline constexpr int64_t PACKED = int64_t{1} << 26;

// p(X) in direct form, and in Gram form in segments between restarts, which direct_polynomial.cpp
// and gram_form.cpp compile. Short side first. O is T, or float for 16-bit T of less than PACKED
// elements.
template <class T, class O>
void direct_form(gemm::Strided<const T> X, const Sizes& x, const std::vector<gemm::Triple>& triples,
                 gemm::Strided<O> out);
template <class T, class O>
void gram_form(gemm::Strided<const T> X, const Sizes& x,
               const std::vector<std::vector<gemm::Triple>>& segments, gemm::Strided<O> out);
std::vector<std::vector<gemm::Triple>> segments_of(const char* op,
                                                   const std::vector<gemm::Triple>& triples,
                                                   const std::vector<int64_t>& restarts);

// A fresh contiguous tensor with the batch dimensions of `like`.
inline Tensor fresh(const Tensor& like, int64_t rows, int64_t cols) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 2 < like.dim(); ++d) sizes.push_back(like.size(d));
  sizes.push_back(rows);
  sizes.push_back(cols);
  return torch::stable::new_empty(like, sizes);
}

inline void check_matrix(const char* op, const char* label, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 2, op, ": ", label, " must have at least 2 dimensions, got ", t.dim());
}

inline void check_square(const char* op, const char* label, const Tensor& t) {
  check_matrix(op, label, t);
  const int64_t rows = t.size(t.dim() - 2), cols = t.size(t.dim() - 1);
  STD_TORCH_CHECK(rows == cols, op, ": ", label, " must be square, got ", rows, " x ", cols);
}

// `other` has the dtype of `t` and its sizes up to the last `differ` dimensions.
inline void check_like(const char* op, const char* label, const Tensor& other, const Tensor& t,
                       int64_t differ) {
  STD_TORCH_CHECK(other.scalar_type() == t.scalar_type(), op, ": ", label,
                  " must have the dtype of the other tensors");
  STD_TORCH_CHECK(other.dim() == t.dim(), op, ": ", label, " must have ", t.dim(),
                  " dimensions like the other tensors, got ", other.dim());
  for (int64_t d = 0; d + differ < t.dim(); ++d) {
    STD_TORCH_CHECK(other.size(d) == t.size(d), op, ": dimension ", d, " of ", label, " must be ",
                    t.size(d), ", got ", other.size(d));
  }
}

}  // namespace orthonorm
