#include "axis_scaling.h"

#include <cfloat>
#include <cmath>

#include "run_loops.h"

namespace orthonorm {

void AxisRule::factors(const Job& job, bool outer, int64_t first, int64_t count,
                       const double* values, double* factors) const {
  if (!decay) {
    const bool inverted = !divides(job.x.dtype);
    for (int64_t i = 0; i < count; ++i) {
      const double by = divisor(values[i] * scale, eps, at);
      factors[i] = inverted ? inverse_or_zero(by) : by;
    }
    return;
  }
  const Line& moments = outer ? job.along_outer() : job.along_inner();
  const double summed = static_cast<double>(outer ? job.x.inner : job.x.outer);
  moments.read(first, count, factors);
  specialized([=, this] {
    for (int64_t i = 0; i < count; ++i) {
      factors[i] = decayed(factors[i], values[i] / summed, beta2);
    }
  });
  moments.write(first, count, factors);
  specialized([=, this] {
    for (int64_t i = 0; i < count; ++i) {
      factors[i] = inverse_or_zero(denominator(factors[i], eps, at));
    }
  });
}

namespace {

// Both norms of the norm-preserving rescale come from the sums, so X is read twice at most: once
// for the sums, once to be scaled. Where the runs summed lie in one piece and no norm is kept, a
// group of runs is scaled while it is in the cache.
class AxisScaling {
 public:
  AxisScaling(const std::vector<Job>& jobs, bool rows, const AxisRule& rule)
      : jobs_(jobs), rows_(rows), rule_(rule) {}

  void run() {
    for_chunks(jobs_, [&](size_t begin, size_t end) {
      plan(begin, end);
      for_units(units_, [&](const Unit& unit) { first_pass(unit); });
      for_units(finishes_, [&](const Unit& unit) { finish(unit); }, 4);
      for (Place& place : places_) rescale(place);
      for_units(seconds_, [&](const Unit& unit) { second_pass(unit); });
    });
  }

 private:
  // Where a job's doubles lie in the workspace: one factor for each run, and the squared norms
  // before and after that parts of the matrix add to the whole.
  struct Place {
    int64_t factors, norms, parts;
    double ratio;
  };

  // Whether the runs that are summed are the job's own, rather than its columns.
  bool along(const Job& job) const { return rows_ != job.swapped; }

  void plan(size_t begin, size_t end) {
    units_.clear(), seconds_.clear(), finishes_.clear(), places_.clear();
    first_job_ = begin;
    int64_t work = 0;
    for (size_t k = begin; k < end; ++k) {
      along(jobs_[k]) ? plan_along(k, work) : plan_across(k, work);
    }
    workspace_.reserve(work);
  }

  void plan_along(size_t id, int64_t& work) {
    const Job& job = jobs_[id];
    Place place{work, work + job.x.outer, 0, 1};
    cut(job, 1, INT64_MAX, [&](int64_t o0, int64_t o1, int64_t i0, int64_t i1) {
      units_.push_back({id, o0, o1, i0, i1, place.norms + 2 * place.parts++});
      if (rule_.keep_norm) seconds_.push_back(units_.back());
    });
    work = place.norms + 2 * place.parts;
    places_.push_back(place);
  }

  // Partial sums of every block of runs side by side, added up share by share.
  void plan_across(size_t id, int64_t& work) {
    const Job& job = jobs_[id];
    const int64_t inner = job.x.inner, shares = ceil_div(inner, kShare);
    const Place place{work, work + inner, shares, 1};
    const int64_t partial = place.norms + 2 * shares;
    int64_t blocks = 0, last = -1;
    cut(job, kColumnRuns, kTile, [&](int64_t o0, int64_t o1, int64_t i0, int64_t i1) {
      if (o0 != last) ++blocks, last = o0;
      units_.push_back({id, o0, o1, i0, i1, partial + (blocks - 1) * inner + i0});
      seconds_.push_back(units_.back());
    });
    for (int64_t i = 0; i < inner; i += kShare) {
      finishes_.push_back({id, 0, blocks, i, std::min(i + kShare, inner), partial});
    }
    work = partial + blocks * inner;
    places_.push_back(place);
  }

  Place& place(const Unit& unit) { return places_[unit.job - first_job_]; }

  void first_pass(const Unit& unit) {
    const Job& job = jobs_[unit.job];
    along(job) ? sum_runs(unit) : sum_columns(job.x, unit, workspace_.at(unit.work));
  }

  // Sums and factors of whole runs, a group at a time that fits L1. If no norm is kept the group is
  // scaled at once, and X comes from memory only here.
  void sum_runs(const Unit& unit) {
    const Job& job = jobs_[unit.job];
    if (streams(job)) return stream_runs(unit);
    constexpr int64_t most = 128;
    const int64_t fitting = kGroup / std::max<int64_t>(1, unit.i1);
    const int64_t group = rule_.keep_norm ? most : std::clamp<int64_t>(fitting, 1, most);
    double values[most];
    CarefulSum before, after;
    for (int64_t o = unit.o0; o < unit.o1; o += group) {
      const int64_t count = std::min(group, unit.o1 - o);
      for (int64_t r = 0; r < count; ++r) {
        values[r] = run_squares(job.x, o + r, rule_.from_norms());
      }
      double* factors = workspace_.at(place(unit).factors + o);
      rule_.factors(job, true, o, count, values, factors);
      if (!rule_.keep_norm) {
        scale_runs(job, {unit.job, o, o + count, unit.i0, unit.i1, 0}, factors, 1, group);
        continue;
      }
      add_norms(count, values, factors, before, after);
    }
    workspace_.at(unit.work)[0] = before.sum;
    workspace_.at(unit.work)[1] = after.sum;
  }

  // Whether runs are long enough to be dealt with one by one, as they lie in memory.
  bool streams(const Job& job) const {
    return !rule_.keep_norm && job.x.dtype != ScalarType::Double && job.x.inner >= 512 &&
           job.x.stride_inner == 1 && job.out.stride_inner == 1;
  }

  // Every run is scaled while the next one is summed.
  void stream_runs(const Unit& unit) {
    const Job& job = jobs_[unit.job];
    double value = run_squares(job.x, unit.o0, rule_.from_norms());
    for (int64_t o = unit.o0; o < unit.o1; ++o) {
      double factor;
      rule_.factors(job, true, o, 1, &value, &factor);
      if (o + 1 == unit.o1) {
        return scale_runs(job, {unit.job, o, o + 1, unit.i0, unit.i1, 0}, &factor, 1, 0);
      }
      const double sum = scale_run_and_sum_next(job, o, factor);
      value = rule_.from_norms() ? std::sqrt(sum) : sum;
    }
  }

  double scale_run_and_sum_next(const Job& job, int64_t o, double factor) const {
    const bool split = splits(&factor, 1, 1);
    const int64_t ahead = runs_ahead(job.x, kAheadOfSums);
    double sum = 0;
    const auto both = [&]<class T>(int64_t i, int64_t n, const Rows<1, T>& next) {
      if constexpr (sizeof(T) < 8) {
        const T* x = reinterpret_cast<const T*>(job.x.at(o, i));
        T* y = reinterpret_cast<T*>(job.out.at(o, i));
        sum += split ? scale_and_sum(x, Split(factor), n, y, next)
                     : scale_and_sum(x, factor, n, y, next);
      }
    };
    for (int64_t i = 0; i < job.x.inner; i += kTile) {
      with_rows<1>(job.x, o + 1, i, std::min(i + kTile, job.x.inner), ahead, both);
    }
    return sum;
  }

  static void add_norms(int64_t count, const double* squares, const double* factors,
                        CarefulSum& before, CarefulSum& after) {
    for (int64_t i = 0; i < count; ++i) {
      const double root = std::sqrt(squares[i]) * factors[i];
      before.add(squares[i]);
      after.add(root * root);
    }
  }

  // Column sums of all blocks of one share, and its factors.
  void finish(const Unit& unit) {
    const Job& job = jobs_[unit.job];
    const int64_t count = unit.i1 - unit.i0;
    double values[kShare] = {};
    CarefulSum before, after;
    for (int64_t block = unit.o0; block < unit.o1; ++block) {
      add_to(values, workspace_.at(unit.work + block * job.x.inner + unit.i0), count);
    }
    if (rule_.from_norms()) column_norms(job, unit.i0, count, values);
    double* factors = workspace_.at(place(unit).factors + unit.i0);
    rule_.factors(job, false, unit.i0, count, values, factors);
    if (!rule_.keep_norm) return;
    add_norms(count, values, factors, before, after);
    double* norms = workspace_.at(place(unit).norms + 2 * (unit.i0 / kShare));
    norms[0] = before.sum;
    norms[1] = after.sum;
  }

  void rescale(Place& place) {
    if (!rule_.keep_norm) return;
    const double* norms = workspace_.at(place.norms);
    CarefulSum before, after;
    for (int64_t part = 0; part < place.parts; ++part) {
      before.add(norms[2 * part]);
      after.add(norms[2 * part + 1]);
    }
    place.ratio = norm_ratio(before.sum, after.sum);
  }

  void second_pass(const Unit& unit) {
    const Job& job = jobs_[unit.job];
    const Place& at = place(unit);
    if (along(job)) {
      return scale_runs(job, unit, workspace_.at(at.factors + unit.o0), at.ratio,
                        runs_ahead(job.x, kAhead));
    }
    scale_columns(job, unit, workspace_.at(at.factors + unit.i0), at.ratio);
  }

  // Where infinities in X leave the factors finite, only doubles take them through.
  bool splits(const double* factors, int64_t count, double ratio) const {
    bool fit = !rule_.decay || rule_.beta2 < 1;
    specialized([=, &fit] {
      for (int64_t i = 0; i < count; ++i) fit &= Split::fits(factors[i] * ratio);
    });
    return fit;
  }

  void scale_columns(const Job& job, const Unit& unit, const double* from, double ratio) const {
    const int64_t count = unit.i1 - unit.i0;
    if (job.x.dtype != ScalarType::Double && splits(from, count, ratio)) {
      const SplitTile tile(from, count, ratio);
      return scale_columns(job, unit, [&](int64_t i) { return tile.from(i); });
    }
    alignas(64) double factors[kTile];
    for (int64_t i = 0; i < count; ++i) factors[i] = from[i] * ratio;
    scale_columns(job, unit, [&](int64_t i) -> const double* { return factors + i; });
  }

  // By what `by(i)` points to, from the unit's column i on.
  template <class By>
  void scale_columns(const Job& job, const Unit& unit, const By& by) const {
    const bool divides = rule_.divides(job.x.dtype);
    const auto scaled = [&]<class T>(int64_t, int64_t i, const T* x, int64_t n, T* y,
                                     const Ahead& next) {
      const auto factors = by(i - unit.i0);
      if constexpr (sizeof(T) == 8 && std::is_same_v<decltype(factors), const double* const>) {
        if (divides) return divide_each(x, factors, n, y);
      }
      scale_each(x, factors, n, y, next);
    };
    for_bands(unit, [&](const Unit& band, int64_t ahead) { map_runs(job, band, ahead, scaled); });
  }

  // What lies `ahead` runs further on comes into the cache meanwhile, if `ahead` is not 0.
  void scale_runs(const Job& job, const Unit& unit, const double* factors, double ratio,
                  int64_t ahead) const {
    const bool split = splits(factors, unit.o1 - unit.o0, ratio);
    const bool divides = rule_.divides(job.x.dtype);
    map_runs(job, unit, ahead,
             [&]<class T>(int64_t o, int64_t, const T* x, int64_t n, T* y, const Ahead& next) {
               const double factor = factors[o - unit.o0];
               if constexpr (sizeof(T) == 8) {
                 if (divides) return divide(x, factor, n, y);
               } else {
                 if (split) return scale(x, Split(factor * ratio), n, y, next);
               }
               scale(x, factor * ratio, n, y, next);
             });
  }

  static constexpr int64_t kGroup = 8192;  // elements of a group of runs

  const std::vector<Job>& jobs_;
  const bool rows_;
  const AxisRule& rule_;
  size_t first_job_ = 0;
  std::vector<Unit> units_, finishes_, seconds_;
  std::vector<Place> places_;
  Workspace workspace_;
};

}  // namespace

void scale_axis(const std::vector<Job>& jobs, bool rows, const AxisRule& rule) {
  AxisScaling(jobs, rows, rule).run();
}

void axis_moment(const char* op, const TensorList& moments, const TensorList& X, bool rows,
                 double beta2, double eps, const std::string& eps_at, bool keep_norm) {
  STD_TORCH_CHECK(moments.size() == X.size(), op, ": lists must have equal lengths, got ",
                  moments.size(), " moments and ", X.size(), " X");
  const AxisRule rule{true, beta2, 1, eps, parse_eps_at(op, eps_at), keep_norm};
  JobList list(op);
  for (size_t i = 0; i < X.size(); ++i) {
    list.add(i, X[i], X[i], rows ? &moments[i] : nullptr, rows ? nullptr : &moments[i]);
  }
  scale_axis(list.jobs(), rows, rule);
}

Tensor axis_normalize(const char* op, const Tensor& X, bool rows, double scale, double eps,
                      const std::string& eps_at) {
  const AxisRule rule{false, 0, scale, eps, parse_eps_at(op, eps_at), false};
  std::vector<int64_t> sizes(X.dim());
  for (int64_t d = 0; d < X.dim(); ++d) sizes[d] = X.size(d);
  Tensor out = torch::stable::empty(sizes, X.scalar_type(), std::nullopt, X.device());
  JobList list(op);
  list.add(0, X, out, nullptr, nullptr);
  scale_axis(list.jobs(), rows, rule);
  return out;
}

}  // namespace orthonorm
