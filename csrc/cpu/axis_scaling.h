// Every run (row or column) of a matrix multiplied by a number made of its sum of squares: the four
// ops `row_moment_`, `column_moment_`, `row_normalize`, `column_normalize`.
//
// X is read once for the sums and once to be scaled; both norms of the norm-preserving rescale come
// from the sums. A Rule says what becomes of them:
//   from_norms: whether it wants norms, to which no scale of X is too large or small, or squares;
//   factors(job, outer, first, count, values, factors): from the norms or squares of `count` runs
//   along the outer (or inner) dimension the factors they are multiplied by;
//   keep_norm: whether a matrix is rescaled to the norm it had;
//   divides(dtype): whether factors are divided by instead.
#pragma once

#include "run_loops.h"

namespace orthonorm {

template <class Rule>
class AxisScaling {
 public:
  AxisScaling(const std::vector<Job>& jobs, bool rows, const Rule& rule)
      : jobs_(jobs), rows_(rows), rule_(rule) {}

  void run() {
    for_chunks(jobs_, [&](size_t begin, size_t end) {
      plan(begin, end);
      for_units(units_, [&](const Unit& unit) {
        dispatch(unit, [&](auto type) { first_pass<decltype(type)>(unit); });
      });
      for_units(finishes_, [&](const Unit& unit) { finish(unit); });
      for (Place& place : places_) rescale(place);
      for_units(seconds_, [&](const Unit& unit) {
        dispatch(unit, [&](auto type) { second_pass<decltype(type)>(unit); });
      });
    });
  }

 private:
  // Where a job's doubles lie in the workspace: one factor for each run, and the squared norms before
  // and after by which parts of the matrix add to the whole.
  struct Place {
    int64_t factors, norms, parts;
    double ratio;
  };

  // How a matrix is stored, A as it is read and M as it is multiplied.
  template <class A_, class M_>
  struct Types {
    using A = A_;
    using M = M_;
  };

  template <class F>
  void dispatch(const Unit& unit, const F& f) const {
    switch (jobs_[unit.job].x.dtype) {
      case ScalarType::Double: return specialized([&] { f(Types<double, double>()); });
      case ScalarType::Float: return specialized([&] { f(Types<float, double>()); });
      default: return specialized([&] { f(Types<float, float>()); });
    }
  }

  // Whether the runs that are summed are the job's own, rather than its columns.
  bool along(const Job& job) const { return rows_ != job.swapped; }

  void plan(size_t begin, size_t end) {
    units_.clear(), seconds_.clear(), finishes_.clear(), places_.clear();
    first_job_ = begin;
    int64_t work = 0;
    for (size_t k = begin; k < end; ++k) {
      if (along(jobs_[k])) {
        plan_along(static_cast<int64_t>(k), work);
      } else {
        plan_across(static_cast<int64_t>(k), work);
      }
    }
    if (work > capacity_) workspace_.reset(new double[work]), capacity_ = work;
  }

  void plan_along(int64_t id, int64_t& work) {
    const Job& job = jobs_[id];
    Place place{work, work + job.x.outer, 0, 1};
    cut(job, 1, INT64_MAX, [&](int64_t o0, int64_t o1, int64_t i0, int64_t i1) {
      units_.push_back({id, o0, o1, i0, i1, place.norms + 2 * place.parts++});
      if (rule_.keep_norm) seconds_.push_back(units_.back());
    });
    work = place.norms + 2 * place.parts;
    places_.push_back(place);
  }

  // Partial sums of every block of runs side by side, added up tile by tile.
  void plan_across(int64_t id, int64_t& work) {
    const Job& job = jobs_[id];
    const int64_t inner = job.x.inner, tiles = ceil_div(inner, kTile);
    const Place place{work, work + inner, tiles, 1};
    const int64_t partial = place.norms + 2 * tiles;
    int64_t blocks = 0, last = -1;
    cut(job, 64, kTile, [&](int64_t o0, int64_t o1, int64_t i0, int64_t i1) {
      if (o0 != last) ++blocks, last = o0;
      units_.push_back({id, o0, o1, i0, i1, partial + (blocks - 1) * inner + i0});
      seconds_.push_back(units_.back());
    });
    for (int64_t t = 0; t < tiles; ++t) {
      finishes_.push_back({id, 0, blocks, t * kTile, std::min((t + 1) * kTile, inner), partial});
    }
    work = partial + blocks * inner;
    places_.push_back(place);
  }

  Place& place(const Unit& unit) { return places_[unit.job - first_job_]; }
  double* work(int64_t at) const { return workspace_.get() + at; }

  template <class T>
  void first_pass(const Unit& unit) {
    if (along(jobs_[unit.job])) {
      sum_runs<T>(unit);
    } else {
      sum_columns<typename T::A>(jobs_[unit.job].x, unit, work(unit.work));
    }
  }

  // Sums and factors of whole runs, a group at a time that fits L1; where no norm is kept the group
  // is scaled at once and X comes from memory only here.
  template <class T>
  void sum_runs(const Unit& unit) {
    const Job& job = jobs_[unit.job];
    constexpr int64_t most = 128;
    const int64_t group = std::clamp<int64_t>(kGroup / std::max<int64_t>(1, unit.i1), 1, most);
    double values[most], before = 0, after = 0;
    for (int64_t o = unit.o0; o < unit.o1; o += group) {
      const int64_t count = std::min(group, unit.o1 - o);
      for (int64_t r = 0; r < count; ++r) {
        values[r] = run_squares<typename T::A>(job.x, o + r, Rule::from_norms);
      }
      double* factors = work(place(unit).factors + o);
      rule_.factors(job, true, o, count, values, factors);
      if (!rule_.keep_norm) {
        scale_runs<T>(job, {unit.job, o, o + count, unit.i0, unit.i1, 0}, factors, 1);
        continue;
      }
      for (int64_t r = 0; r < count; ++r) {
        const double root = std::sqrt(values[r]) * factors[r];
        before += values[r];
        after += root * root;
      }
    }
    work(unit.work)[0] = before;
    work(unit.work)[1] = after;
  }

  // Column sums of all blocks of one tile, and the tile's factors.
  void finish(const Unit& unit) {
    const Job& job = jobs_[unit.job];
    const int64_t count = unit.i1 - unit.i0;
    double values[kTile] = {};
    specialized([&] {
      for (int64_t block = unit.o0; block < unit.o1; ++block) {
        const double* part = work(unit.work + block * job.x.inner + unit.i0);
        for (int64_t i = 0; i < count; ++i) values[i] += part[i];
      }
    });
    if (Rule::from_norms) column_norms(job, unit.i0, count, values);
    double* factors = work(place(unit).factors + unit.i0);
    specialized([&] { rule_.factors(job, false, unit.i0, count, values, factors); });
    double before = 0, after = 0;
    for (int64_t i = 0; rule_.keep_norm && i < count; ++i) {
      const double root = std::sqrt(values[i]) * factors[i];
      before += values[i];
      after += root * root;
    }
    double* norms = work(place(unit).norms + 2 * (unit.i0 / kTile));
    norms[0] = before;
    norms[1] = after;
  }

  void rescale(Place& place) const {
    double before = 0, after = 0;
    for (int64_t part = 0; rule_.keep_norm && part < place.parts; ++part) {
      before += work(place.norms)[2 * part];
      after += work(place.norms)[2 * part + 1];
    }
    if (rule_.keep_norm) place.ratio = norm_ratio(before, after);
  }

  template <class T>
  void second_pass(const Unit& unit) {
    const Job& job = jobs_[unit.job];
    const Place& at = place(unit);
    if (along(job)) return scale_runs<T>(job, unit, work(at.factors + unit.o0), at.ratio);
    using M = typename T::M;
    alignas(64) M factors[kTile];
    for (int64_t i = unit.i0; i < unit.i1; ++i) {
      factors[i - unit.i0] = static_cast<M>(work(at.factors)[i] * at.ratio);
    }
    const bool divides = rule_.divides(job.x.dtype);
    map_runs<typename T::A>(job, unit, [&](int64_t, int64_t i, const auto* x, int64_t n, auto* y) {
      if constexpr (std::is_same_v<typename T::A, double>) {
        if (divides) return divide_each(x, factors + (i - unit.i0), n, y);
      }
      scale_each<M>(x, factors + (i - unit.i0), n, y);
    });
  }

  template <class T>
  void scale_runs(const Job& job, const Unit& unit, const double* factors, double ratio) const {
    const bool divides = rule_.divides(job.x.dtype);
    map_runs<typename T::A>(job, unit, [&](int64_t o, int64_t, const auto* x, int64_t n, auto* y) {
      const double factor = factors[o - unit.o0];
      if constexpr (std::is_same_v<typename T::A, double>) {
        if (divides) return divide(x, factor, n, y);
      }
      scale<typename T::M>(x, factor * ratio, n, y);
    });
  }

  static constexpr int64_t kGroup = 8192;  // elements of a group of runs

  const std::vector<Job>& jobs_;
  const bool rows_;
  const Rule& rule_;
  size_t first_job_ = 0;
  int64_t capacity_ = 0;
  std::vector<Unit> units_, finishes_, seconds_;
  std::vector<Place> places_;
  std::unique_ptr<double[]> workspace_;
};

}  // namespace orthonorm
