// Some rows of every matrix: a copy of them, and what is left of them in the matrix.
#include "row_lists.h"

namespace orthonorm {
namespace {

constexpr int64_t kColumns = 1024;
// Of transposed matrices, where the elements of a row are far apart but beside those of others.
constexpr int64_t kFew = 64;

// Columns [begin, end) of all rows taken.
template <class A>
void take(const RowJob& job, A factor, int64_t begin, int64_t end) {
  alignas(64) A scratch[kColumns], left[kColumns];
  const Oriented &x = job.whole, &y = job.some;
  const int64_t count = end - begin;
  for (size_t c = 0; c < job.rows.size(); ++c) {
    char* const at = x.at(job.rows[c], begin);
    const A* values = load(at, x.dtype, x.along, count, scratch);
    store(values, y.at(static_cast<int64_t>(c), begin), y.dtype, y.along, count);
    A* to = target(at, x.dtype, x.along, left);
    specialized([=] {
      for (int64_t j = 0; j < count; ++j) to[j] = factor * values[j];
    });
    store(to, at, x.dtype, x.along, count);
  }
}

void take_rows_(const TensorList& X, const TensorList& rows, const Tensor& factor,
                const TensorList& out) {
  const double mu = item(factor);
  const std::vector<RowJob> jobs = row_jobs("take_rows_", X, rows, out, true);
  std::vector<Share> shares;
  int64_t elements = 0;
  for (size_t k = 0; k < jobs.size(); ++k) {
    const Oriented& x = jobs[k].whole;
    cut(shares, k, x.columns, x.by_rows() ? kColumns : kFew);
    elements += static_cast<int64_t>(jobs[k].rows.size()) * x.columns;
  }
  for_shares(shares, elements, [&](const Share& share) {
    const RowJob& job = jobs[share.job];
    if (job.whole.dtype == ScalarType::Double) {
      take<double>(job, mu, share.begin, share.end);
    } else {
      take<float>(job, static_cast<float>(mu), share.begin, share.end);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("take_rows_", TORCH_BOX(&take_rows_)); }

}  // namespace orthonorm
