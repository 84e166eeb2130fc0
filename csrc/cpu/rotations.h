// Products with a basis Q of a matrix's short side, from either side, into memory of any strides.
#pragma once

#include "../orthonorm.h"

#include "gemm_words.h"

namespace orthonorm {

// D <- alpha Q X + beta D, or with Q^T: X and D as matrices whose short side are rows. Q is packed
// as the left operand, so that the memory of a product does not grow with the long side.
struct Rotation {
  const char* op;
  bool transposed;
  double alpha, beta;

  void operator()(const Tensor& out, const Tensor& X, const Tensor& Q) const {
    check_matrix(op, "X", X);
    check_square(op, "Q", Q);
    check_sizes(out, X, Q);
    if (X.numel() == 0) return;
    const ScalarType dtype = Q.scalar_type();
    const Tensor x = X.scalar_type() == dtype ? X : torch::stable::to(X, dtype);
    if (out.scalar_type() == dtype) {
      with_element(op, dtype, [&](auto element) { run<decltype(element)>(out, x, Q); });
    } else {
      Tensor copy = torch::stable::to(out, dtype);
      with_element(op, dtype, [&](auto element) { run<decltype(element)>(copy, x, Q); });
      torch::stable::copy_(const_cast<Tensor&>(out), copy);
    }
  }

 private:
  template <class T>
  void run(const Tensor& out, const Tensor& X, const Tensor& Q) const {
    const Tensor x = batched(X), q = batched(Q);
    Tensor d = batched(out);
    const MatrixView shape = view(x);
    const bool wide = shape.rows < shape.cols;
    gemm::Product<T> p;
    p.batch = shape.batch, p.rows = p.depth = std::min(shape.rows, shape.cols);
    p.cols = std::max(shape.rows, shape.cols);
    p.L = strided<const T>(q);
    if (transposed) p.L = p.L.transposed();
    p.R = strided<const T>(x);
    p.D = strided<T>(d);
    if (!wide) p.R = p.R.transposed(), p.D = p.D.transposed();
    if (beta != 0) p.E = {p.D.data, p.D.row, p.D.col, p.D.batch};
    p.alpha = alpha, p.beta = beta;
    compute(p);
    if (d.data_ptr() != out.data_ptr()) torch::stable::copy_(const_cast<Tensor&>(out), d);
  }

  void check_sizes(const Tensor& out, const Tensor& X, const Tensor& Q) const {
    const int64_t dim = X.dim();
    STD_TORCH_CHECK(out.dim() == dim && Q.dim() == dim, op, ": tensors must have ", dim,
                    " dimensions, got ", out.dim(), " and ", Q.dim());
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t of_basis = d + 2 < dim ? X.size(d) : std::min(X.size(dim - 2), X.size(dim - 1));
      STD_TORCH_CHECK(out.size(d) == X.size(d) && Q.size(d) == of_basis, op, ": dimension ", d,
                      " must be ", X.size(d), ", and ", of_basis, " of Q; got ", out.size(d),
                      " and ", Q.size(d));
    }
  }
};

}  // namespace orthonorm
