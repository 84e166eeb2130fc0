// X <- the polynomial of X, or of `source`, over its norm: scaled into memory that calls leave to
// each other, iterated there, written in the dtype of X.
#include "../orthonorm.h"

#include "elementwise.h"
#include "gemm_words.h"

namespace orthonorm {
namespace {

// Lines of memory of a batch of matrices: its rows, or its columns where these are contiguous.
struct Lines {
  char* data;
  ScalarType dtype;
  int64_t batch, count, length, batch_stride, stride, step;  // strides in elements

  explicit Lines(const MatrixView& v, bool columns)
      : data(static_cast<char*>(v.data)),
        dtype(v.dtype),
        batch(v.batch),
        count(columns ? v.cols : v.rows),
        length(columns ? v.rows : v.cols),
        batch_stride(v.stride_batch),
        stride(columns ? v.stride_col : v.stride_row),
        step(columns ? v.stride_row : v.stride_col) {}

  char* at(int64_t line, int64_t place) const {
    const int64_t start = line / count * batch_stride + line % count * stride;
    return data + (start + place * step) * element_size(dtype);
  }
};

constexpr int64_t RUN = 1024;  // elements of a line at a time: in the first cache

// to = from / divisor, rounded once; 0 for 0. In double, where one over the norm of narrower
// numbers is normal: a power of two in both cancels.
template <class A, class T>
void scale_run(const A* __restrict from, double divisor, int64_t count, T* __restrict to) {
  if (divisor == 0) return static_cast<void>(std::fill(to, to + count, T{}));
  const double by = 1.0 / divisor;
  for (int64_t j = 0; j < count; ++j) {
    const double value = static_cast<double>(from[j]);
    const double quotient = sizeof(A) == 8 ? value / divisor : value * by;
    if constexpr (sizeof(T) == 2) {
      narrow(to_odd(quotient), to[j]);
    } else {
      to[j] = static_cast<T>(quotient);
    }
  }
}

// f(line, place in it, count) for all runs of all lines, shared among threads.
template <class F>
void over_runs(const Lines& lines, const F& f) {
  parallel(lines.batch * lines.count, 1 + (int64_t{1} << 14) / (lines.length + 1),
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) {
               for (int64_t j = 0; j < lines.length; j += RUN) {
                 f(i, j, std::min(RUN, lines.length - j));
               }
             }
           });
}

template <class T, class O>
void run(const MatrixView& from, const MatrixView& v, ScalarType iterated,
         const std::vector<double>& divisors, const std::vector<gemm::Triple>& triples,
         const std::vector<std::vector<gemm::Triple>>& segments) {
  using gemm::Workspace;
  using A = std::conditional_t<sizeof(T) == 8 || sizeof(O) == 8, double, float>;
  constexpr bool same = std::is_same_v<T, O>;
  constexpr bool writes = same || (sizeof(T) == 2 && std::is_same_v<O, float>);  // O, from T
  const bool by_columns = v.stride_row == 1 && v.stride_col != 1;
  const Lines given(from, by_columns), lines(v, by_columns);
  const int64_t size = v.rows * v.cols;
  const bool straight = same || (writes && size < PACKED);
  Workspace memory((straight ? 1 : 2) * Workspace::bytes_for<T>(v.batch * size));
  T* const scaled = memory.take<T>(v.batch * size);
  T* const result = straight ? nullptr : memory.take<T>(v.batch * size);
  over_runs(lines, [&](int64_t line, int64_t place, int64_t count) {
    alignas(64) A values[RUN];
    const A* const x = load<A>(given.at(line, place), v.dtype, given.step, count, values);
    T* const to = scaled + line * lines.length + place;
    const double divisor = divisors[line / lines.count];
    specialized([=] { scale_run(x, divisor, count, to); });
  });
  // As matrices with the short side first.
  const bool turned = v.rows > v.cols;
  const Sizes sizes{v.batch, std::min(v.rows, v.cols), std::max(v.rows, v.cols)};
  const auto held = [&](auto* at) {
    gemm::Strided<std::remove_pointer_t<decltype(at)>> s{at, by_columns ? 1 : v.cols,
                                                         by_columns ? v.rows : 1, size};
    if (turned) std::swap(s.row, s.col);
    return s;
  };
  const auto form = [&](auto out) {
    const auto X = held(static_cast<const T*>(scaled));
    segments.empty() ? direct_form(X, sizes, triples, out) : gram_form(X, sizes, segments, out);
  };
  if (straight) {
    if constexpr (writes) {
      gemm::Strided<O> out{static_cast<O*>(v.data), v.stride_row, v.stride_col, v.stride_batch};
      if (turned) std::swap(out.row, out.col);
      form(out);
    }
    return;
  }
  form(held(result));
  over_runs(lines, [&](int64_t line, int64_t place, int64_t count) {
    alignas(64) A values[RUN];
    const T* const from = result + line * lines.length + place;
    store(load<A>(from, iterated, 1, count, values), lines.at(line, place), v.dtype, lines.step,
          count);
  });
}

void scaled_polynomial_(Tensor X, Tensor divisors, std::vector<double> coefficients,
                        std::vector<int64_t> restarts, bool gram, ScalarType dtype,
                        std::optional<Tensor> source) {
  const char* const op = "scaled_polynomial_";
  check_matrix(op, "X", X);
  if (source) {
    check_matrix(op, "source", *source);
    const Facts to(X), from(*source);
    STD_TORCH_CHECK(from.same_shape(to) && from.dtype == to.dtype, op,
                    ": source must have the shape and dtype of X ", to.shape(), ", got ",
                    from.shape());
  }
  const std::vector<gemm::Triple> triples = triples_of(op, coefficients);
  const auto segments = gram ? segments_of(op, triples, restarts)
                             : std::vector<std::vector<gemm::Triple>>();
  const std::vector<double> by = numbers(op, "divisors", divisors);
  const Tensor x = batched(X);
  const Tensor y = source ? batched(*source) : x;
  const MatrixView v = view(x), from = view(y);
  STD_TORCH_CHECK(static_cast<int64_t>(by.size()) == v.batch, op, ": divisors must have ", v.batch,
                  " numbers, got ", by.size());
  if (v.numel() == 0) return;
  with_element(op, dtype, [&](auto iterated) {
    with_element(op, v.dtype, [&](auto stored) {
      run<decltype(iterated), decltype(stored)>(from, v, dtype, by, triples, segments);
    });
  });
  if (x.data_ptr() != X.data_ptr()) torch::stable::copy_(X, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("scaled_polynomial_", TORCH_BOX(&scaled_polynomial_));
}

}  // namespace orthonorm
