// Lists of matrices of which rows are numbered: each as it lies in memory, a transposed view too.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "layout.h"

namespace orthonorm {

// One matrix of a (batch of) matrices.
struct Oriented {
  char* data;
  ScalarType dtype;
  int64_t rows, columns, down, along;

  // Matrix `index` of the batch.
  Oriented(const Facts& t, int64_t index)
      : data(t.data),
        dtype(t.dtype),
        rows(t.sizes[t.dim - 2]),
        columns(t.sizes[t.dim - 1]),
        down(t.strides[t.dim - 2]),
        along(t.strides[t.dim - 1]) {
    int64_t offset = 0;
    for (int64_t d = t.dim - 2; d-- > 0; index /= t.sizes[d]) {
      offset += index % t.sizes[d] * t.strides[d];
    }
    data += offset * element_size(dtype);
  }

  char* at(int64_t i, int64_t j) const {
    return data + (i * down + j * along) * element_size(dtype);
  }
  // Whether columns are nearer together in memory than rows: runs of memory are then rows.
  bool by_rows() const { return rows == 1 || (along <= down && columns != 1); }
};

// The line of numbers that belongs to matrix `index` of a batch.
inline char* line_of(const Facts& t, int64_t index, int64_t size) {
  int64_t offset = 0;
  for (int64_t d = t.dim - 1; d-- > 0; index /= t.sizes[d]) {
    offset += index % t.sizes[d] * t.strides[d];
  }
  return t.data + offset * size;
}

inline int64_t matrices_of(const Facts& t) {
  int64_t count = 1;
  for (int64_t d = 0; d < t.dim - 2; ++d) count *= t.sizes[d];
  return count;
}

inline void check_matrix(const char* op, const char* name, size_t i, const Facts& t, bool written) {
  STD_TORCH_CHECK(t.dim >= 2 && floating(t.dtype), op, ": ", name, "[", i,
                  "] must be a floating-point matrix or a batch of them, got shape ", t.shape());
  STD_TORCH_CHECK(!written || !t.expanded(), op, ": ", name, "[", i,
                  "] is written and must not be expanded");
}

// A matrix, numbers of its rows, and what belongs to these rows.
struct RowJob {
  size_t entry;
  Oriented whole;
  std::vector<int64_t> rows;
  Oriented some;
};

// The matrices of lists, after checks of all that memory safety needs. Nothing is written before.
inline std::vector<RowJob> row_jobs(const char* op, const TensorList& whole, const TensorList& rows,
                                    const TensorList& some, bool writes_some) {
  STD_TORCH_CHECK(whole.size() == rows.size() && whole.size() == some.size(), op,
                  ": lists must have equal lengths, got ", whole.size(), ", ", rows.size(),
                  " and ", some.size());
  std::vector<RowJob> jobs;
  for (size_t i = 0; i < whole.size(); ++i) {
    const Facts x(whole[i]), r(rows[i]), y(some[i]);
    check_matrix(op, "matrices", i, x, true);
    check_matrix(op, "their rows", i, y, writes_some);
    bool fits = r.dtype == ScalarType::Long && r.dim == x.dim - 1 && y.dim == x.dim &&
                y.sizes[y.dim - 1] == x.sizes[x.dim - 1] &&
                std::equal(r.sizes, r.sizes + r.dim, y.sizes);
    for (int64_t d = 0; fits && d < x.dim - 2; ++d) fits = r.sizes[d] == x.sizes[d];
    STD_TORCH_CHECK(fits, op, ": rows[", i, "] must be int64 of shape (..., k) beside ", x.shape(),
                    " and (..., k, n), got ", r.shape(), " and ", y.shape());
    const int64_t count = r.sizes[r.dim - 1], stride = r.strides[r.dim - 1];
    for (int64_t b = 0; b < matrices_of(x); ++b) {
      jobs.push_back({i, Oriented(x, b), std::vector<int64_t>(count), Oriented(y, b)});
      const int64_t* const given = reinterpret_cast<int64_t*>(line_of(r, b, sizeof(int64_t)));
      for (int64_t c = 0; c < count; ++c) {
        const int64_t row = jobs.back().rows[c] = given[c * stride];
        STD_TORCH_CHECK(row >= 0 && row < x.sizes[x.dim - 2], op, ": rows[", i,
                        "] must be below ", x.sizes[x.dim - 2], ", got ", row);
      }
    }
  }
  return jobs;
}

// Lines [begin, end) of the lines of one job, which one thread works on.
struct Share {
  size_t job;
  int64_t begin, end;
};

// Cuts `count` lines of job `job` into shares of some `most` lines.
inline void cut(std::vector<Share>& shares, size_t job, int64_t count, int64_t most) {
  for (int64_t i = 0; i < count; i += most) shares.push_back({job, i, std::min(count, i + most)});
}

// As many lines of `length` elements as a share takes.
inline int64_t share_of(int64_t length) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, length));
}

template <class F>
void for_shares(const std::vector<Share>& shares, int64_t elements, const F& f) {
  const int64_t count = static_cast<int64_t>(shares.size());
  const int64_t grain = std::max<int64_t>(1, count * 32768 / std::max<int64_t>(1, elements));
  parallel(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(shares[k]);
  });
}

}  // namespace orthonorm
