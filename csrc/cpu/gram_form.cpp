// The polynomial in Gram form: products of ../gemm.h around the chain of ../gram_polynomial.h.
#include "../orthonorm.h"

#include "../gram_polynomial.h"
#include "gemm_words.h"

namespace orthonorm {
namespace {

// X <- Q X with Q = p(X X^T) for every segment of the iterations; Gram matrices and the chain in S,
// Q and what is between the segments in T.
template <class T>
void gram_form_into(gemm::Strided<const T> X, const Sizes& x, gemm::Strided<T> out,
                    const std::vector<std::vector<gemm::Triple>>& segments) {
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
    const gemm::Strided<T> to = i + 1 == segments.size() ? out : next;
    apply_into<T>(X, x, {Q.data, Q.row, Q.col, Q.batch}, 0, 1, to);
    X = {to.data, to.row, to.col, to.batch};
    std::swap(next, spare);
  }
}

std::vector<std::vector<gemm::Triple>> segments_of(const std::vector<gemm::Triple>& triples,
                                                   const std::vector<int64_t>& restarts) {
  std::vector<std::vector<gemm::Triple>> segments;
  int64_t from = 0;
  const auto cut = [&](int64_t to) {
    segments.emplace_back(triples.begin() + from, triples.begin() + to);
    from = to;
  };
  const int64_t count = static_cast<int64_t>(triples.size());
  for (const int64_t r : restarts) {
    STD_TORCH_CHECK(from < r && r < count, "gram_form: restarts must increase within [1, ",
                    count - 1, "], got ", r);
    cut(r);
  }
  cut(count);
  return segments;
}

Tensor gram_form(Tensor X, std::vector<double> coefficients, std::vector<int64_t> restarts) {
  check_matrix("gram_form", "X", X);
  const auto segments = segments_of(triples_of("gram_form", coefficients), restarts);
  const Tensor x = batched(X);
  const MatrixView shape = view(x);
  Tensor out = fresh(x, shape.rows, shape.cols);
  if (out.numel() == 0) return out;
  with_element("gram_form", shape.dtype, [&](auto element) {
    using T = decltype(element);
    const auto [from, to, sizes] = short_side_first<T>(x, out);
    gram_form_into<T>(from, sizes, to, segments);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("gram_form", TORCH_BOX(&gram_form)); }

}  // namespace orthonorm
