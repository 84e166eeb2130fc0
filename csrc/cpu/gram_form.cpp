// The polynomial in Gram form: products of ../gemm.h around the chain of ../gram_polynomial.h.
#include "../orthonorm.h"

#include "../gram_polynomial.h"
#include "gemm_words.h"

namespace orthonorm {
// X <- Q X with Q = p(X X^T) for every segment of the iterations; Gram matrices and the chain in S,
// Q and what is between the segments in T.
template <class T, class O>
void gram_form(gemm::Strided<const T> X, const Sizes& x,
               const std::vector<std::vector<gemm::Triple>>& segments, gemm::Strided<O> out) {
  using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using gemm::Workspace;
  const int64_t squares = x.batch * x.rows * x.rows;
  const int64_t between = segments.size() > 1 ? x.batch * x.rows * x.cols : 0;
  const bool twice = segments.size() > 2;
  Workspace memory(Workspace::bytes_for<S>(squares) + Workspace::bytes_for<T>(squares) +
                   (1 + twice) * Workspace::bytes_for<T>(between));
  const auto R = packed(memory.take<S>(squares), x.rows, x.rows);
  const auto Q = packed(memory.take<T>(squares), x.rows, x.rows);
  gemm::Strided<T> next = packed(memory.take<T>(between), x.rows, x.cols), spare = next;
  if (twice) spare = packed(memory.take<T>(between), x.rows, x.cols);
  for (size_t i = 0; i < segments.size(); ++i) {
    gram_into(X, x, R);
    gemm::gram_polynomial<S, T>({R.data, R.row, R.col, R.batch}, segments[i], Q, x.batch, x.rows,
                                torch::stable::get_num_threads(), torch_threads, isa());
    const gemm::Strided<const T> by{Q.data, Q.row, Q.col, Q.batch};
    if (i + 1 == segments.size()) return apply_into<T, O>(X, x, by, 0, 1, out);
    apply_into<T, T>(X, x, by, 0, 1, next);
    X = {next.data, next.row, next.col, next.batch};
    std::swap(next, spare);
  }
}

template void gram_form(gemm::Strided<const float>, const Sizes&,
                        const std::vector<std::vector<gemm::Triple>>&, gemm::Strided<float>);
template void gram_form(gemm::Strided<const double>, const Sizes&,
                        const std::vector<std::vector<gemm::Triple>>&, gemm::Strided<double>);
template void gram_form(gemm::Strided<const Bf16>, const Sizes&,
                        const std::vector<std::vector<gemm::Triple>>&, gemm::Strided<Bf16>);
template void gram_form(gemm::Strided<const Bf16>, const Sizes&,
                        const std::vector<std::vector<gemm::Triple>>&, gemm::Strided<float>);
template void gram_form(gemm::Strided<const Fp16>, const Sizes&,
                        const std::vector<std::vector<gemm::Triple>>&, gemm::Strided<Fp16>);
template void gram_form(gemm::Strided<const Fp16>, const Sizes&,
                        const std::vector<std::vector<gemm::Triple>>&, gemm::Strided<float>);

std::vector<std::vector<gemm::Triple>> segments_of(const char* op,
                                                   const std::vector<gemm::Triple>& triples,
                                                   const std::vector<int64_t>& restarts) {
  std::vector<std::vector<gemm::Triple>> segments;
  int64_t from = 0;
  const auto cut = [&](int64_t to) {
    segments.emplace_back(triples.begin() + from, triples.begin() + to);
    from = to;
  };
  const int64_t count = static_cast<int64_t>(triples.size());
  for (const int64_t r : restarts) {
    STD_TORCH_CHECK(from < r && r < count, op, ": restarts must increase within [1, ",
                    count - 1, "], got ", r);
    cut(r);
  }
  cut(count);
  return segments;
}

namespace {

Tensor gram_form_op(Tensor X, std::vector<double> coefficients, std::vector<int64_t> restarts) {
  check_matrix("gram_form", "X", X);
  const auto segments = segments_of("gram_form", triples_of("gram_form", coefficients), restarts);
  const Tensor x = batched(X);
  const MatrixView shape = view(x);
  Tensor out = fresh(x, shape.rows, shape.cols);
  if (out.numel() == 0) return out;
  with_element("gram_form", shape.dtype, [&](auto element) {
    using T = decltype(element);
    const auto [from, to, sizes] = short_side_first<T>(x, out);
    gram_form<T, T>(from, sizes, segments, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("gram_form", TORCH_BOX(&gram_form_op)); }

}  // namespace orthonorm
