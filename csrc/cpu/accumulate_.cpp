// S <- S + X, and the sums of |S| along rows.
#include <cmath>

#include "row_lists.h"

namespace orthonorm {
namespace {

constexpr int64_t kPiece = 1024;  // elements of a row at a time
constexpr int64_t kStrip = 256;   // rows of a transposed matrix at a time

struct Accumulation {
  Oriented sums, x;
  char* sizes;
  ScalarType dtype;
  int64_t stride;
  bool wide;

  // Adds `count` elements, `stride_s` and `stride_x` apart. Returns them as they are stored.
  template <class A>
  const A* add(char* s, int64_t stride_s, const char* from, int64_t stride_x, int64_t count,
               A* first, A* second) const {
    const A* old = load(s, sums.dtype, stride_s, count, first);
    const A* more = load(from, x.dtype, stride_x, count, second);
    A* to = target(s, sums.dtype, stride_s, first);
    specialized([=] {
      for (int64_t i = 0; i < count; ++i) to[i] = old[i] + more[i];
    });
    store(to, s, sums.dtype, stride_s, count);
    if (sums.dtype != dtype_of<A>()) load_into(s, sums.dtype, stride_s, count, first);
    return to;
  }

  void write(int64_t first, int64_t count, const double* values) const {
    store(values, sizes + first * stride * element_size(dtype), dtype, stride, count);
  }
};

// Sums of |x| in 64 interleaved lanes, then halves: the same order for every instruction set.
template <class A>
double size_of(const A* x, int64_t count) {
  constexpr int64_t lanes = 64;
  double sums[lanes] = {};
  specialized([&] {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      for (int64_t k = 0; k < lanes; ++k) sums[k] += std::abs(static_cast<double>(x[i + k]));
    }
    for (int64_t k = 0; i < count; ++i, ++k) sums[k] += std::abs(static_cast<double>(x[i]));
    for (int64_t half = lanes / 2; half > 0; half /= 2) {
      for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
    }
  });
  return sums[0];
}

template <class A>
void along_rows(const Accumulation& a, int64_t begin, int64_t end) {
  alignas(64) A first[kPiece], second[kPiece];
  for (int64_t i = begin; i < end; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < a.sums.columns; j += kPiece) {
      const int64_t count = std::min(kPiece, a.sums.columns - j);
      sum += size_of(a.add(a.sums.at(i, j), a.sums.along, a.x.at(i, j), a.x.along, count, first,
                           second), count);
    }
    a.write(i, 1, &sum);
  }
}

// Of rows [begin, end), at most kStrip of them, which lie side by side in memory.
template <class A>
void across_rows(const Accumulation& a, int64_t begin, int64_t end) {
  alignas(64) A first[kStrip], second[kStrip];
  double sums[kStrip] = {};
  const int64_t count = end - begin;
  for (int64_t j = 0; j < a.sums.columns; ++j) {
    const A* now = a.add(a.sums.at(begin, j), a.sums.down, a.x.at(begin, j), a.x.down, count,
                         first, second);
    specialized([&] {
      for (int64_t i = 0; i < count; ++i) sums[i] += std::abs(static_cast<double>(now[i]));
    });
  }
  a.write(begin, count, sums);
}

void accumulate_(const TensorList& sums, const TensorList& X, const TensorList& sizes) {
  const char* const op = "accumulate_";
  STD_TORCH_CHECK(sums.size() == X.size() && sums.size() == sizes.size(), op,
                  ": lists must have equal lengths, got ", sums.size(), " sums, ", X.size(),
                  " X and ", sizes.size(), " sizes");
  std::vector<Accumulation> jobs;
  std::vector<Share> shares;
  int64_t elements = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    const Facts s(sums[i]), x(X[i]), z(sizes[i]);
    check_matrix(op, "sums", i, s, true);
    check_matrix(op, "X", i, x, false);
    STD_TORCH_CHECK(x.same_shape(s) && z.dim == s.dim - 1 && floating(z.dtype) && !z.expanded() &&
                        std::equal(z.sizes, z.sizes + z.dim, s.sizes),
                    op, ": X[", i, "] and sizes[", i, "] must have the shape and the rows of sums ",
                    s.shape(), ", got ", x.shape(), " and ", z.shape());
    const bool wide = s.dtype == ScalarType::Double || x.dtype == ScalarType::Double;
    for (int64_t b = 0; b < matrices_of(s); ++b) {
      const Accumulation a{Oriented(s, b), Oriented(x, b), line_of(z, b, element_size(z.dtype)),
                           z.dtype, z.strides[z.dim - 1], wide};
      const int64_t length = a.sums.columns;
      cut(shares, jobs.size(), a.sums.rows, a.sums.by_rows() ? share_of(length) : kStrip);
      elements += a.sums.rows * length;
      jobs.push_back(a);
    }
  }
  for_shares(shares, elements, [&](const Share& share) {
    const Accumulation& a = jobs[share.job];
    const bool by_rows = a.sums.by_rows();
    const auto run = by_rows ? (a.wide ? along_rows<double> : along_rows<float>)
                             : (a.wide ? across_rows<double> : across_rows<float>);
    run(a, share.begin, share.end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("accumulate_", TORCH_BOX(&accumulate_)); }

}  // namespace orthonorm
