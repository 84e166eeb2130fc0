// Newton-Schulz on lists of small matrices: one core each, whole polynomials in its cache.
#include "../small_newton_schulz.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <numeric>
#include <optional>

#include "../scratch.h"
#include "convert.h"

namespace orthonorm {
namespace {

using small::Arithmetic;
using small::Polynomial;
using small::Scaling;

// The matrices of one tensor of the list.
struct Batch {
  Tensor x, y;
  int64_t count, rows, cols;
  int64_t first;  // place of its first matrix among the matrices of the whole list
  Arithmetic arithmetic;
};

// One thread's share of work at a time: matrices [begin, end) of a batch.
struct Unit {
  size_t batch;
  int64_t begin, end;
};

// Multiplications, about 10 us: threads meet at a counter per unit.
constexpr double unit_cost = 4e6;

// By dtype and shape alone: the same alone and in any company.
Arithmetic arithmetic_of(ScalarType dtype, int64_t rows, int64_t cols) {
  if (dtype == ScalarType::Double) return Arithmetic::float64;
  if (dtype == ScalarType::BFloat16 && isa() == Isa::amx) {
    // float32 is more precise, and here faster than vdpbf16ps at every size (32 x 32: 5.7 against
    // 10 us) and than tiles, 32 columns wide, at short sides up to 16 (16 x 16: 1.2 against 2.1 us,
    // 24 x 24: 3.7 against 2.2 us; one thread of a Xeon, 2026-11).
    return std::min(rows, cols) > 16 ? Arithmetic::bfloat16_tiles : Arithmetic::float32;
  }
  if (dtype == ScalarType::BFloat16 && isa() == Isa::avx512bf16) return Arithmetic::bfloat16;
  return Arithmetic::float32;  // also for float16: more precise, and no slower here
}

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

double cost(int64_t rows, int64_t cols, size_t steps) {
  const double L = std::max(rows, cols), S = std::min(rows, cols);
  return 1000 + static_cast<double>(steps) * (1.5 * L * S * S + 0.5 * S * S * S);
}

// Address of matrix `index` of the batch dimensions of t, whatever their strides.
char* matrix_at(const Tensor& t, int64_t index) {
  int64_t offset = 0;
  for (int64_t d = t.dim() - 3; d >= 0; --d) {
    offset += index % t.size(d) * t.stride(d);
    index /= t.size(d);
  }
  return static_cast<char*>(t.data_ptr()) + offset * element_size(t.scalar_type());
}

// The matrix at `data` as rows of In: in place where memory allows, else converted to `staging`.
template <class In>
small::Source<In> source(const Batch& b, const char* data, In* staging) {
  const int64_t dim = b.x.dim(), down = b.x.stride(dim - 2), right = b.x.stride(dim - 1);
  const ScalarType dtype = b.x.scalar_type();
  // Of a matrix that lies by columns, the columns are read.
  const bool flipped = right != 1 && down == 1;
  const int64_t rows = flipped ? b.cols : b.rows, cols = flipped ? b.rows : b.cols;
  const int64_t next = flipped ? right : down, step = flipped ? down : right;
  if (dtype == dtype_of<In>() && (step == 1 || cols == 1)) {
    return {reinterpret_cast<const In*>(data), rows, cols, next, flipped};
  }
  specialized([&] {
    for (int64_t r = 0; r < rows; ++r) {
      const char* const row = data + r * next * element_size(dtype);
      const In* const values = load<In>(row, dtype, step, cols, staging + r * cols);
      if (values != staging + r * cols) std::copy(values, values + cols, staging + r * cols);
    }
  });
  return {staging, rows, cols, cols, flipped};
}

struct Job {
  std::vector<Batch> batches;
  std::vector<Unit> units;
  Scaling scaling;
  Polynomial polynomial;
  const Tensor* norms;  // null: measure
  int64_t staging_bytes = 0, workspace_bytes = 0;
};

template <class In, class E>
void run_one(const Job& job, const Batch& b, int64_t index, std::byte* staging,
             std::byte* workspace) {
  const small::Source<In> x =
      source<In>(b, matrix_at(b.x, index), reinterpret_cast<In*>(staging));
  double norm = 0;
  if (job.norms != nullptr) norm = item(*job.norms, b.first + index);
  const ScalarType dtype = b.y.scalar_type();
  char* const to = static_cast<char*>(b.y.data_ptr()) +
                   index * b.rows * b.cols * element_size(dtype);
  // The input is no longer needed when the result is delivered: both may use `staging`.
  E* const y = target(to, dtype, 1, reinterpret_cast<E*>(staging));
  small::run<In, E>(isa(), b.arithmetic, x, job.scaling, job.norms ? &norm : nullptr,
                    job.polynomial, workspace, y);
  specialized([&] { store(y, to, dtype, 1, b.rows * b.cols); });
}

void run_unit(const Job& job, const Unit& unit, std::byte* staging, std::byte* workspace) {
  const Batch& b = job.batches[unit.batch];
  const bool from64 = b.x.scalar_type() == ScalarType::Double;
  const bool in64 = b.arithmetic == Arithmetic::float64;
  for (int64_t i = unit.begin; i < unit.end; ++i) {
    if (from64 && in64) run_one<double, double>(job, b, i, staging, workspace);
    if (from64 && !in64) run_one<double, float>(job, b, i, staging, workspace);
    if (!from64 && in64) run_one<float, double>(job, b, i, staging, workspace);
    if (!from64 && !in64) run_one<float, float>(job, b, i, staging, workspace);
  }
}

// Dearest matrices first, so that the last units to finish are short ones.
void cut_units(Job& job) {
  std::vector<size_t> order(job.batches.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto cost_of = [&](size_t i) {
    const Batch& b = job.batches[i];
    return cost(b.rows, b.cols, static_cast<size_t>(job.polynomial.steps));
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t i, size_t j) { return cost_of(i) > cost_of(j); });
  for (const size_t i : order) {
    const Batch& b = job.batches[i];
    if (b.rows * b.cols == 0) continue;
    const int64_t some = std::max<int64_t>(1, static_cast<int64_t>(unit_cost / cost_of(i)));
    for (int64_t begin = 0; begin < b.count; begin += some) {
      job.units.push_back({i, begin, std::min(begin + some, b.count)});
    }
    job.staging_bytes = std::max(job.staging_bytes, small::round_up(b.rows * b.cols * 8, 64));
    job.workspace_bytes = std::max(job.workspace_bytes,
                                   small::workspace_bytes(b.rows, b.cols, b.arithmetic));
  }
}

// Threads take units from a counter; each has its own workspace.
void run_units(const Job& job) {
  const auto count = static_cast<int64_t>(job.units.size());
  const int64_t threads =
      std::min<int64_t>(count, torch::stable::get_num_threads());
  if (threads == 0) return;
  const int64_t bytes = job.staging_bytes + job.workspace_bytes;
  const Held held(bytes * threads);
  const auto release = [](std::byte* p) { ::operator delete(p, std::align_val_t{64}); };
  const std::unique_ptr<std::byte, decltype(release)> memory(
      static_cast<std::byte*>(
          ::operator new(static_cast<size_t>(bytes * threads), std::align_val_t{64})),
      release);
  std::atomic<int64_t> next{0};
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      std::byte* const staging = memory.get() + thread * bytes;
      for (int64_t i = next++; i < count; i = next++) {
        run_unit(job, job.units[static_cast<size_t>(i)], staging, staging + job.staging_bytes);
      }
    }
  });
}

Batch make_batch(const Tensor& x, size_t i, int64_t first, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() >= 2, "small_newton_schulz: X[", i,
                  "] must have at least 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(x.is_cpu(), "small_newton_schulz: X[", i, "] must be on the CPU");
  STD_TORCH_CHECK(is_float(x.scalar_type()), "small_newton_schulz: X[", i,
                  "] must be float32, float64, bfloat16 or float16");
  const int64_t rows = x.size(x.dim() - 2), cols = x.size(x.dim() - 1);
  STD_TORCH_CHECK(small::fits(rows, cols), "small_newton_schulz: X[", i,
                  "] must have at most 128 x 128 entries or a single row or column, got ", rows,
                  " x ", cols);
  int64_t count = 1;
  for (int64_t d = 0; d + 2 < x.dim(); ++d) count *= x.size(d);
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  return {x, y, count, rows, cols, first, arithmetic_of(dtype, rows, cols)};
}

TensorList small_newton_schulz(TensorList X, std::vector<double> coefficients, ScalarType dtype,
                               bool scale, double eps, double safety,
                               std::optional<Tensor> norms) {
  STD_TORCH_CHECK(coefficients.size() % 3 == 0,
                  "small_newton_schulz: coefficients must be (a, b, c) per iteration, got ",
                  coefficients.size(), " numbers");
  STD_TORCH_CHECK(is_float(dtype),
                  "small_newton_schulz: dtype must be float32, float64, bfloat16 or float16");
  Job job;
  job.scaling = {scale, eps, safety};
  job.polynomial = {coefficients.data(), static_cast<int64_t>(coefficients.size() / 3)};
  job.norms = scale && norms.has_value() ? &*norms : nullptr;
  int64_t first = 0;
  TensorList result;
  for (size_t i = 0; i < X.size(); ++i) {
    job.batches.push_back(make_batch(X[i], i, first, dtype));
    first += job.batches.back().count;
    result.push_back(job.batches.back().y);
  }
  if (norms.has_value()) {
    STD_TORCH_CHECK(norms->dim() == 1 && norms->numel() == first && norms->is_cpu(),
                    "small_newton_schulz: norms must be one number per matrix, ", first, ", got ",
                    norms->numel());
    STD_TORCH_CHECK(norms->scalar_type() == ScalarType::Double ||
                        norms->scalar_type() == ScalarType::Float,
                    "small_newton_schulz: norms must be float64 or float32");
  }
  cut_units(job);
  run_units(job);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("small_newton_schulz", TORCH_BOX(&small_newton_schulz));
}

}  // namespace orthonorm
