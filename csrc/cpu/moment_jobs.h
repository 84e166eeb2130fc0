// Lists of (batches of) matrices as jobs for the row and column kernels, cut into units of work.
//
// A matrix is seen as `outer` runs of `inner` elements, its shorter stride inside, so a row of a
// transposed matrix is a column here. How it is cut depends on its shape alone: sums, and with them
// every result, are the same for any number of threads, for a matrix alone and in a list.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../moments.h"
#include "../scratch.h"
#include "layout.h"

namespace orthonorm {

// Columns that are worked on at a time: their sums fit L1.
constexpr int64_t kTile = 4096;
// Columns whose sums a thread concludes at a time: few, as the others wait.
constexpr int64_t kShare = 512;
// Elements of a unit: enough to wake a thread for, few enough to share one matrix among threads.
constexpr int64_t kUnit = 65536;
// Runs a unit of column sums has at least, so that partial sums stay small beside the matrix.
constexpr int64_t kColumnRuns = 64;
// Bytes of matrices a thread sees twice before it goes on to the next.
constexpr int64_t kChunk = int64_t{4} << 20;

// A matrix in memory.
struct Runs {
  char* data;
  ScalarType dtype;
  int64_t outer, inner, stride_outer, stride_inner;

  char* at(int64_t o, int64_t i) const {
    return data + (o * stride_outer + i * stride_inner) * element_size(dtype);
  }
  void swap() {
    std::swap(outer, inner);
    std::swap(stride_outer, stride_inner);
  }
};

// A row's or column's numbers in memory.
struct Line {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t stride = 0;

  void read(int64_t first, int64_t count, double* to) const {
    load_into(data + first * stride * element_size(dtype), dtype, stride, count, to);
  }
  void write(int64_t first, int64_t count, const double* from) const {
    store(from, data + first * stride * element_size(dtype), dtype, stride, count);
  }
};

// One matrix, the one its result goes to (itself if in place) and its moments.
struct Job {
  Runs x, out;
  Line rows, columns;
  bool swapped;  // outer runs are columns

  const Line& along_outer() const { return swapped ? columns : rows; }
  const Line& along_inner() const { return swapped ? rows : columns; }
  int64_t bytes() const { return x.outer * x.inner * element_size(x.dtype); }
};

// Runs [o0, o1) x elements [i0, i1) of one job; `work` is the first of its doubles in the
// workspace.
struct Unit {
  size_t job;
  int64_t o0, o1, i0, i1, work;
};

// Doubles that hold nothing at first, kept from chunk to chunk.
class Workspace {
 public:
  void reserve(int64_t count) {
    if (count <= capacity_) return;
    held_.emplace(count * sizeof(double));
    memory_.reset(new double[count]);
    capacity_ = count;
  }
  double* at(int64_t offset) const { return memory_.get() + offset; }

 private:
  std::unique_ptr<double[]> memory_;
  std::optional<Held> held_;
  int64_t capacity_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many elements ahead of their use memory is fetched, in whole runs.
constexpr int64_t kAhead = 1024, kAheadOfSums = 4096;

inline int64_t runs_ahead(const Runs& x, int64_t elements) {
  return ceil_div(elements, std::clamp<int64_t>(x.inner, 1, elements));
}

inline EpsAt parse_eps_at(const char* op, const std::string& name) {
  if (name == "outside") return EpsAt::outside;
  if (name == "inside") return EpsAt::inside;
  STD_TORCH_CHECK(name == "clamp", op, ": eps_at must be outside, inside or clamp, got ", name);
  return EpsAt::clamp;
}

// Makes jobs of tensors after checking all that memory safety needs; nothing is written here.
class JobList {
 public:
  explicit JobList(const char* op) : op_(op) {}

  // X[i], its result out (X[i] itself if in place) and its moments, either of which may be missing.
  void add(size_t i, const Tensor& x, const Tensor& out, const Tensor* rows,
           const Tensor* columns) {
    const Facts fx(x), fout(out);
    check(i, "X", fx, fout);
    std::array<Facts, 2> lines = {Facts(rows ? *rows : x), Facts(columns ? *columns : x)};
    if (rows) check_line(i, "row moments", lines[0], fx, fx.dim - 1);
    if (columns) check_line(i, "column moments", lines[1], fx, fx.dim - 2);
    if (fx.empty()) return;
    Job job{};
    job.x = runs(fx);
    job.out = runs(fout);
    job.swapped = shorter_outside(job.x);
    if (job.swapped) job.x.swap(), job.out.swap();
    if (rows) job.rows = {lines[0].data, lines[0].dtype, lines[0].strides[fx.dim - 2]};
    if (columns) job.columns = {lines[1].data, lines[1].dtype, lines[1].strides[fx.dim - 1]};
    add_batch(job, fx, fout, lines);
  }

  const std::vector<Job>& jobs() const { return jobs_; }

 private:
  void check(size_t i, const char* name, const Facts& x, const Facts& out) const {
    STD_TORCH_CHECK(x.dim >= 2, op_, ": ", name, "[", i,
                    "] must have at least 2 dimensions, got shape ", x.shape());
    STD_TORCH_CHECK(floating(x.dtype), op_, ": ", name, "[", i,
                    "] must be float32, float64, bfloat16 or float16");
    check_apart(i, name, out);
  }

  // Threads write apart from each other only if no two indices mean the same memory.
  void check_apart(size_t i, const char* name, const Facts& t) const {
    STD_TORCH_CHECK(!t.expanded(), op_, ": ", name, "[", i,
                    "] is written and must not be an expanded tensor");
  }

  void check_line(size_t i, const char* name, const Facts& line, const Facts& x,
                  int64_t reduced) const {
    bool fits = line.dim == x.dim;
    for (int64_t d = 0; fits && d < x.dim; ++d) {
      fits = line.sizes[d] == (d == reduced ? 1 : x.sizes[d]);
    }
    STD_TORCH_CHECK(fits, op_, ": ", name, "[", i, "] must have the shape of X[", i, "] ",
                    x.shape(), " but 1 in dimension ", reduced, ", got ", line.shape());
    STD_TORCH_CHECK(floating(line.dtype), op_, ": ", name, "[", i,
                    "] must be float32, float64, bfloat16 or float16");
    check_apart(i, name, line);
  }

  static Runs runs(const Facts& t) {
    const int64_t row = t.dim - 2, column = t.dim - 1;
    return {t.data, t.dtype, t.sizes[row], t.sizes[column], t.strides[row], t.strides[column]};
  }

  static bool shorter_outside(const Runs& x) {
    if (x.outer <= 1) return false;
    return x.inner <= 1 || std::abs(x.stride_outer) < std::abs(x.stride_inner);
  }

  void add_batch(const Job& first, const Facts& x, const Facts& out,
                 const std::array<Facts, 2>& lines) {
    int64_t batch = 1;
    for (int64_t d = 0; d + 2 < x.dim; ++d) batch *= x.sizes[d];
    for (int64_t b = 0; b < batch; ++b) {
      Job job = first;
      int64_t rest = b;
      for (int64_t d = x.dim - 2; d-- > 0; rest /= x.sizes[d]) {
        const int64_t at = rest % x.sizes[d];
        job.x.data += at * x.strides[d] * element_size(x.dtype);
        job.out.data += at * out.strides[d] * element_size(out.dtype);
        move(job.rows, at * lines[0].strides[d]);
        move(job.columns, at * lines[1].strides[d]);
      }
      jobs_.push_back(job);
    }
  }

  static void move(Line& line, int64_t elements) {
    if (line.data != nullptr) line.data += elements * element_size(line.dtype);
  }

  const char* op_;
  std::vector<Job> jobs_;
};

// Cuts `job` into units of whole or partial runs and calls f(o0, o1, i0, i1) for each.
template <class F>
inline void cut(const Job& job, int64_t min_runs, int64_t max_width, const F& f) {
  const int64_t width = std::max<int64_t>(1, std::min(job.x.inner, max_width));
  const int64_t runs = ceil_div(std::max(min_runs, ceil_div(kUnit, width)), 8) * 8;
  for (int64_t o = 0; o < job.x.outer; o += runs) {
    for (int64_t i = 0; i == 0 || i < job.x.inner; i += max_width) {
      f(o, std::min(o + runs, job.x.outer), i, std::min(i + max_width, job.x.inner));
    }
  }
}

// Calls f(begin, end) for stretches of jobs whose matrices fit the caches together, so that a
// second pass finds there what the first one read.
template <class F>
inline void for_chunks(const std::vector<Job>& jobs, const F& f) {
  const int64_t limit = kChunk * static_cast<int64_t>(torch::stable::get_num_threads());
  for (size_t begin = 0; begin < jobs.size();) {
    size_t end = begin;
    for (int64_t bytes = 0; end < jobs.size(); ++end) {
      bytes += jobs[end].bytes();
      if (bytes > limit && end > begin) break;
    }
    f(begin, end);
    begin = end;
  }
}

// Runs f(unit) over all units on torch's threads. The share of a thread is the same in every pass
// over the same units. Backwards in the second pass, towards what the first left in the cache,
// gained nothing on matrices that fit it and lost 10-20% on larger ones (2026-11).
// `weight` is what an element costs in elements of a matrix.
template <class F>
inline void for_units(const std::vector<Unit>& units, const F& f, int64_t weight = 1) {
  int64_t elements = 0;
  for (const Unit& u : units) elements += weight * (u.o1 - u.o0) * (u.i1 - u.i0);
  const int64_t count = static_cast<int64_t>(units.size());
  const int64_t grain = std::max<int64_t>(1, count * (kUnit / 2) / std::max<int64_t>(1, elements));
  parallel(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(units[k]);
  });
}

}  // namespace orthonorm
