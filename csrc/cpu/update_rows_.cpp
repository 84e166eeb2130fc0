// Decay of whole matrices and updates of some of their rows, in one pass.
#include "../decayed_update.h"
#include "row_lists.h"

namespace orthonorm {
namespace {

// Rows [begin, end), of which `places` says which update they get, or -1.
template <class A>
void along_rows(const RowJob& job, const DecayedUpdate<A>& c, const std::vector<int64_t>& places,
                int64_t begin, int64_t end) {
  constexpr int64_t piece = 1024;
  alignas(64) A first[piece], second[piece];
  const Oriented &w = job.whole, &u = job.some;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = 0; j < w.columns; j += piece) {
      const int64_t count = std::min(piece, w.columns - j);
      char* const at = w.at(i, j);
      const A* old = load(at, w.dtype, w.along, count, first);
      A* to = target(at, w.dtype, w.along, first);
      if (places[i] < 0) {
        specialized([=] {
          for (int64_t k = 0; k < count; ++k) to[k] = c.decay * old[k];
        });
      } else {
        const A* by = load(u.at(places[i], j), u.dtype, u.along, count, second);
        specialized([=] {
          for (int64_t k = 0; k < count; ++k) {
            A value = old[k];
            decayed_update(c, value, by[k]);
            to[k] = value;
          }
        });
      }
      store(to, at, w.dtype, w.along, count);
    }
  }
}

// Columns [begin, end), whose elements lie side by side in memory.
template <class A>
void along_columns(const RowJob& job, const DecayedUpdate<A>& c, int64_t begin, int64_t end) {
  const Oriented &w = job.whole, &u = job.some;
  const int64_t some = static_cast<int64_t>(job.rows.size());
  std::vector<A> scratch(w.rows), updates(some), updated(some);
  for (int64_t j = begin; j < end; ++j) {
    char* const at = w.at(0, j);
    const A* old = load(at, w.dtype, w.down, w.rows, scratch.data());
    const A* by = load(u.at(0, j), u.dtype, u.down, some, updates.data());
    for (int64_t k = 0; k < some; ++k) {
      updated[k] = old[job.rows[k]];
      decayed_update(c, updated[k], by[k]);
    }
    A* to = target(at, w.dtype, w.down, scratch.data());
    specialized([=, &w] {
      for (int64_t i = 0; i < w.rows; ++i) to[i] = c.decay * old[i];
    });
    for (int64_t k = 0; k < some; ++k) to[job.rows[k]] = updated[k];
    store(to, at, w.dtype, w.down, w.rows);
  }
}

void update_rows_(const TensorList& params, const TensorList& rows, const TensorList& updates,
                  const Tensor& lr, const Tensor& weight_decay,
                  const std::vector<double>& factors) {
  STD_TORCH_CHECK(factors.size() == params.size(), "update_rows_: factors must have ",
                  params.size(), " numbers, got ", factors.size());
  const double rate = item(lr), decay = item(weight_decay);
  const std::vector<RowJob> jobs = row_jobs("update_rows_", params, rows, updates, false);
  std::vector<std::vector<int64_t>> places(jobs.size());
  std::vector<Share> shares;
  int64_t elements = 0;
  for (size_t k = 0; k < jobs.size(); ++k) {
    const Oriented& w = jobs[k].whole;
    if (w.by_rows()) {
      places[k].assign(w.rows, -1);
      int64_t place = 0;
      for (const int64_t row : jobs[k].rows) places[k][row] = place++;
      cut(shares, k, w.rows, share_of(w.columns));
    } else {
      cut(shares, k, w.columns, share_of(w.rows));
    }
    elements += w.rows * w.columns;
  }
  for_shares(shares, elements, [&](const Share& share) {
    const RowJob& job = jobs[share.job];
    const auto run = [&]<class A>(A) {
      const DecayedUpdate<A> c(rate, decay, factors[job.entry]);
      if (job.whole.by_rows()) {
        along_rows(job, c, places[share.job], share.begin, share.end);
      } else {
        along_columns(job, c, share.begin, share.end);
      }
    };
    const bool wide = job.whole.dtype == ScalarType::Double || job.some.dtype == ScalarType::Double;
    wide ? run(double{}) : run(float{});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) { m.impl("update_rows_", TORCH_BOX(&update_rows_)); }

}  // namespace orthonorm
