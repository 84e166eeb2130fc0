// `factored_moment_`: X is read once for the sums and once to be scaled.
//
// The norm of the result is needed before anything is written, and it is a sum of x_ij^2 y_ij^2 f^2
// over all elements, which row and column sums do not determine. But y_ij^2 is a row's number times
// a column's, and a row's is known once that row was read: while it sits in the cache its squares
// are added to column sums once more, weighted. That is exact for eps = 0 and for a clamp that
// touches nothing; otherwise the next order in eps comes from one more set of column sums, and only
// where both leave an error to be seen (eps near the root of V somewhere) X is read a third time.
#include "run_loops.h"
#include "short_sums.h"

namespace orthonorm {
namespace {

// What a unit of runs, or a share of the columns, adds to its matrix.
struct Part {
  double before;       // sum of x^2
  double moments;      // sum of the moments
  double largest;      // of 1 / sqrt(moment)
  double first, second;  // weighted sums for the norm; `first` is the norm in the third pass
};
constexpr int64_t kPart = sizeof(Part) / sizeof(double);

class FactoredMoments {
 public:
  FactoredMoments(const std::vector<Job>& jobs, double beta2, double eps, EpsAt at, bool keep_norm)
      : jobs_(jobs), beta2_(beta2), eps_(eps), at_(at), near_(at), keep_norm_(keep_norm) {}

  void run() {
    for_chunks(jobs_, [&](size_t begin, size_t end) {
      plan(begin, end);
      for_units(units_, [&](const Unit& unit) { first_pass(unit); });
      for_units(shares_, [&](const Unit& unit) { finish(unit); }, 12);
      for (size_t k = begin; k < end; ++k) conclude(jobs_[k], places_[k - begin]);
      std::vector<Unit> third;
      std::copy_if(units_.begin(), units_.end(), std::back_inserter(third),
                   [&](const Unit& u) { return keep_norm_ && !place(u).norm_known; });
      if (!third.empty()) {
        for_units(third, [&](const Unit& unit) { norm_pass(unit); });
        for (Place& p : places_) rescale(p);
      }
      for_units(units_, [&](const Unit& unit) { second_pass(unit); });
    });
  }

 private:
  // Where a job's doubles lie in the workspace: a number for each run and column, parts by unit and
  // share; and what became of them.
  struct Place {
    int64_t outer, inner, parts, units, shares;
    double mean = 0, ratio = 1, before = 0;
    bool near = false, norm_known = true;
  };

  int64_t sets() const { return keep_norm_ ? 3 : 1; }  // of column sums

  void plan(size_t begin, size_t end) {
    units_.clear(), shares_.clear(), places_.clear();
    first_job_ = begin;
    int64_t work = 0;
    for (size_t k = begin; k < end; ++k) {
      const Job& job = jobs_[k];
      const int64_t inner = job.x.inner;
      Place place{};
      place.outer = work;
      place.inner = place.outer + job.x.outer;
      place.shares = ceil_div(inner, kShare);
      place.parts = place.inner + inner;
      work = place.parts + kPart * place.shares;
      cut(job, kUnitRuns, INT64_MAX, [&](int64_t o0, int64_t o1, int64_t i0, int64_t i1) {
        units_.push_back({k, o0, o1, i0, i1, work + place.units++ * (kPart + sets() * inner)});
      });
      for (int64_t i = 0; i < inner; i += kShare) {
        shares_.push_back({k, 0, place.units, i, std::min(i + kShare, inner), work});
      }
      work += place.units * (kPart + sets() * inner);
      places_.push_back(place);
    }
    workspace_.reserve(work);
  }

  Place& place(const Unit& unit) { return places_[unit.job - first_job_]; }
  const Place& place(const Unit& unit) const { return places_[unit.job - first_job_]; }
  double* work(int64_t at) const { return workspace_.at(at); }
  Part& part(int64_t at) const { return *reinterpret_cast<Part*>(work(at)); }

  // Moments of the runs, then weighted column sums of the same runs while they are in the cache.
  void first_pass(const Unit& unit) {
    const Runs& x = jobs_[unit.job].x;
    double* sums = work(unit.work + kPart);
    std::fill(sums, sums + sets() * x.inner, 0.0);
    Part total{};
    int64_t o = unit.o0;
    if (!wide(jobs_[unit.job]) && x.inner <= kTile) {
      for (; o + kGroup <= unit.o1; o += kGroup) add_runs<kGroup>(unit, o, sums, total);
    }
    for (; o + 8 <= unit.o1; o += 8) add_runs<8>(unit, o, sums, total);
    for (; o < unit.o1; ++o) add_runs<1>(unit, o, sums, total);
    part(unit.work) = total;
  }

  // Whether float64 shows how sums over runs were rounded.
  static bool wide(const Job& job) {
    return job.x.dtype == ScalarType::Double || job.along_inner().dtype == ScalarType::Double;
  }

  // Runs [o, o + R) of a unit.
  template <int R>
  void add_runs(const Unit& unit, int64_t o, double* sums, Part& total) const {
    const Job& job = jobs_[unit.job];
    double squares[R];
    for (int r = 0; r < R; ++r) squares[r] = run_squares(job.x, o + r, false);
    const auto weights = run_moments<R>(job, o, squares, work(place(unit).outer + o), total);
    const WeightedSums to{sums, sums + job.x.inner, sums + 2 * job.x.inner};
    with_rows<R>(job.x, o, 0, job.x.inner, 0, [&](int64_t i, int64_t n, const auto& rows) {
      if (keep_norm_) {
        const WeightedSums at{to.plain + i, to.first + i, to.second + i};
        return add_weighted_squares(rows, weights, n, at, wide(job));
      }
      for (const auto* row : rows.at) add_squares(Rows{{row}}, n, to.plain + i);
    });
  }

  // 1 / sqrt(moment) of runs [o, o + R); returns the weights of their squares in the norm.
  template <int R>
  Weights<R> run_moments(const Job& job, int64_t o, const double* squares, double* inverses,
                         Part& total) const {
    double moments[R];
    Weights<R> weights;
    job.along_outer().read(o, R, moments);
    for (int r = 0; r < R; ++r) {
      moments[r] = decayed(moments[r], squares[r] / static_cast<double>(job.x.inner), beta2_);
      const double inverse = inverse_or_zero(std::sqrt(moments[r])), square = inverse * inverse;
      inverses[r] = inverse;
      weights.first[r] = square;
      weights.second[r] = square * (at_ == EpsAt::inside ? square : inverse);
      total.before += squares[r];
      total.moments += moments[r];
      total.largest = std::max(total.largest, inverse);
    }
    job.along_outer().write(o, R, moments);
    return weights;
  }

  // The columns of one share: their sums over all units, their moments, what they add to the norm.
  void finish(const Unit& share) {
    const Job& job = jobs_[share.job];
    const int64_t count = share.i1 - share.i0, inner = job.x.inner;
    double sums[3][kShare] = {};
    for (int64_t unit = share.o0; unit < share.o1; ++unit) {
      const double* from = work(share.work + unit * (kPart + sets() * inner) + kPart + share.i0);
      for (int64_t s = 0; s < sets(); ++s) add_to(sums[s], from + s * inner, count);
    }
    double moments[kShare];
    double* inverses = work(place(share).inner + share.i0);
    job.along_inner().read(share.i0, count, moments);
    const double* squares = sums[0];
    specialized([=, this, &moments, &job] {
      for (int64_t i = 0; i < count; ++i) {
        const double mean_square = squares[i] / static_cast<double>(job.x.outer);
        moments[i] = decayed(moments[i], mean_square, beta2_);
        inverses[i] = inverse_or_zero(std::sqrt(moments[i]));
      }
    });
    job.along_inner().write(share.i0, count, moments);
    Part total{};
    for (int64_t i = 0; i < count; ++i) {
      const double square = inverses[i] * inverses[i];
      total.moments += moments[i];
      total.largest = std::max(total.largest, inverses[i]);
      total.first += square * sums[1][i];
      total.second += square * (at_ == EpsAt::inside ? square : inverses[i]) * sums[2][i];
    }
    part(place(share).parts + kPart * (share.i0 / kShare)) = total;
  }

  // The matrix as a whole: the mean of its row moments, whether eps is small, the norm.
  void conclude(const Job& job, Place& p) const {
    Part runs{}, columns{};
    const int64_t first_unit = p.parts + kPart * p.shares;
    for (int64_t u = 0; u < p.units; ++u) {
      add(runs, part(first_unit + u * (kPart + sets() * job.x.inner)));
    }
    for (int64_t t = 0; t < p.shares; ++t) add(columns, part(p.parts + kPart * t));
    const int64_t rows = job.swapped ? job.x.inner : job.x.outer;
    p.mean = (job.swapped ? columns : runs).moments / static_cast<double>(rows);
    p.before = runs.before;
    // The largest y and t of the matrix, and what the neglected terms may amount to.
    const bool wide = job.x.dtype == ScalarType::Double, inside = at_ == EpsAt::inside;
    const double y = std::sqrt(p.mean) * runs.largest * columns.largest;
    const double t = inside ? eps_ * y * y : eps_ * y;
    p.near = t <= (at_ == EpsAt::clamp ? 1 : wide ? 0x1p-18 : 0x1p-11);
    const double scale = inside ? p.mean : std::sqrt(p.mean);
    const double order0 = p.mean * columns.first;
    const double order1 = p.mean * near_.norm_linear * eps_ * scale * columns.second;
    p.norm_known = p.near && 1.5 * t * order1 <= order0 * (wide ? 0x1p-54 : 0x1p-35);
    if (keep_norm_ && p.norm_known) p.ratio = norm_ratio(p.before, order0 - order1);
  }

  static void add(Part& sum, const Part& part) {
    sum.before += part.before;
    sum.moments += part.moments;
    sum.largest = std::max(sum.largest, part.largest);
    sum.first += part.first;
    sum.second += part.second;
  }

  // Calls f(roots) with sqrt(moment) of the columns of each tile of a unit, and the tile.
  template <class F>
  void for_tiles(const Unit& unit, const double* inverses, const F& f) const {
    for (int64_t i = unit.i0; i < unit.i1; i += kTile) {
      const Unit tile{unit.job, unit.o0, unit.o1, i, std::min(i + kTile, unit.i1), 0};
      double roots[kTile];
      for (int64_t j = i; j < tile.i1; ++j) roots[j - i] = inverse_or_zero(inverses[j]);
      f(tile, roots);
    }
  }

  FarRun far_run(const Unit& unit, int64_t o) {
    const Place& p = place(unit);
    const double root = inverse_or_zero(std::sqrt(p.mean) * work(p.outer)[o]);
    return {root, p.ratio, eps_};
  }

  // |X^|^2 of a unit where eps is not small.
  void norm_pass(const Unit& unit) {
    const Runs& x = jobs_[unit.job].x;
    double sum = 0;
    for_tiles(unit, work(place(unit).inner), [&](const Unit& tile, const double* roots) {
      for (int64_t o = tile.o0; o < tile.o1; ++o) {
        const FarRun c = far_run(unit, o);
        with_rows<1>(x, o, tile.i0, tile.i1, 0, [&](int64_t i, int64_t n, const auto& row) {
          const double* at = roots + (i - tile.i0);
          sum += at_ == EpsAt::outside  ? sum_far<EpsAt::outside>(row.at[0], c, at, n)
                 : at_ == EpsAt::inside ? sum_far<EpsAt::inside>(row.at[0], c, at, n)
                                        : sum_far<EpsAt::clamp>(row.at[0], c, at, n);
        });
      }
    });
    part(unit.work).first = sum;
  }

  void rescale(Place& p) const {
    if (p.norm_known) return;
    const Job& job = jobs_[first_job_ + (&p - places_.data())];
    double after = 0;
    for (int64_t u = 0; u < p.units; ++u) {
      after += part(p.parts + kPart * p.shares + u * (kPart + sets() * job.x.inner)).first;
    }
    p.ratio = norm_ratio(p.before, after);
  }

  void second_pass(const Unit& unit) {
    const Job& job = jobs_[unit.job];
    const Place& p = place(unit);
    if (p.near) return near_pass(unit, p);
    for_tiles(unit, work(p.inner), [&](const Unit& tile, const double* roots) {
      const auto far = [&](int64_t o, int64_t i, const auto* x, int64_t n, auto* y, const Ahead&) {
        const FarRun c = far_run(unit, o);
        const double* at = roots + (i - tile.i0);
        if (at_ == EpsAt::outside) return scale_far<EpsAt::outside>(x, c, at, n, y);
        if (at_ == EpsAt::inside) return scale_far<EpsAt::inside>(x, c, at, n, y);
        scale_far<EpsAt::clamp>(x, c, at, n, y);
      };
      map_runs(job, tile, runs_ahead(job.x, kAhead), far);
    });
  }

  void near_pass(const Unit& unit, const Place& p) const {
    const Job& job = jobs_[unit.job];
    for_bands(unit, [&](const Unit& band, int64_t ahead) {
      const int64_t i = band.i0;
      const double* columns = work(p.inner) + i;
      if (job.x.dtype != ScalarType::Double && splits(band, p)) {
        const SplitTile split(columns, band.i1 - i);
        scale_near_band(band, ahead, p, [&](int64_t j) { return split.from(j - i); });
      } else {
        scale_near_band(band, ahead, p,
                        [&](int64_t j) -> const double* { return columns + (j - i); });
      }
    });
  }

  // Whether floats hold the numbers of rows and columns and all their products.
  bool splits(const Unit& tile, const Place& p) const {
    const double row = std::sqrt(p.mean) * p.ratio, *rows = work(p.outer), *columns = work(p.inner);
    bool fit = beta2_ < 1;
    specialized([=, &fit] {
      const auto within = [](double x, double most) {
        return (x == 0) | ((x * most >= 1) & (x <= most));
      };
      for (int64_t o = tile.o0; o < tile.o1; ++o) fit &= within(row * rows[o], 0x1p20);
      for (int64_t j = tile.i0; j < tile.i1; ++j) fit &= within(columns[j], 0x1p60);
    });
    return fit;
  }

  NearRun near_run(const Place& p, int64_t o) const {
    const double row = std::sqrt(p.mean) * work(p.outer)[o];
    const double eps = eps_ * (at_ == EpsAt::inside ? row * row : row);
    return {row * p.ratio, eps, near_.linear, near_.quadratic};
  }

  // With the columns' numbers from column j on where `columns(j)` points.
  template <class Columns>
  void scale_near_band(const Unit& band, int64_t ahead, const Place& p,
                       const Columns& columns) const {
    const Job& job = jobs_[band.job];
    const auto near = [&](int64_t o, int64_t i, const auto* x, int64_t n, auto* y,
                          const Ahead& next) {
      const NearRun run = near_run(p, o);
      at_ == EpsAt::inside ? scale_near<true>(x, run, columns(i), n, y, next)
                           : scale_near<false>(x, run, columns(i), n, y, next);
    };
    map_runs(job, band, ahead, near);
  }

  static constexpr int64_t kUnitRuns = 128;  // of a unit at least: its three rows of sums are small
  // Runs whose squares are summed both ways in the cache: of up to kTile elements they fit L2.
  static constexpr int kGroup = 32;

  const std::vector<Job>& jobs_;
  const double beta2_, eps_;
  const EpsAt at_;
  const NearFactor near_;
  const bool keep_norm_;
  size_t first_job_ = 0;
  std::vector<Unit> units_, shares_;
  std::vector<Place> places_;
  Workspace workspace_;
};

void factored_moment_(TensorList row_moments, TensorList column_moments, TensorList X, double beta2,
                      double eps, std::string eps_at, bool keep_norm) {
  const char* op = "factored_moment_";
  STD_TORCH_CHECK(row_moments.size() == X.size() && column_moments.size() == X.size(), op,
                  ": lists must have equal lengths, got ", row_moments.size(), " row_moments, ",
                  column_moments.size(), " column_moments and ", X.size(), " X");
  const EpsAt at = parse_eps_at(op, eps_at);
  JobList list(op);
  for (size_t i = 0; i < X.size(); ++i) {
    list.add(i, X[i], X[i], &row_moments[i], &column_moments[i]);
  }
  FactoredMoments(list.jobs(), beta2, eps, at, keep_norm).run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("factored_moment_", TORCH_BOX(&factored_moment_));
}

}  // namespace orthonorm
