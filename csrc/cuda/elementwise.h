// One pass over the elements of N lists, one launch for a list: every op is a functor on N numbers.
//
//   struct Op {
//     static constexpr int lists = N;
//     static constexpr unsigned reads, writes;  // bit k: list k is
//     static constexpr Measure measure;         // of every matrix
//     static constexpr unsigned integers;       // if there is one, bit k: list k is of int16
//     Number found_inf;                         // if there is one: nothing is done unless it is 0,
//                                               // but by ops that measure: they look themselves
//     template <class A> __device__ Constants<A> prepare(const Entry<N>&, int64_t b) const;
//     template <class A>
//     __device__ static auto apply(const Constants<A>&, A (&x)[N], int64_t place);
//   };
//
// `apply` changes what is written and returns what is measured, where an op measures;
// `place` is how far in memory x[0] is from where its tensor begins, in elements.
// A block takes a tile of one matrix, a thread runs of eight elements of it. Which elements a thread
// has depends on the matrix and its dtypes alone: sums have the same bits at any address, in any
// company. Whole tiles whose tensors all begin at 16 bytes move 16 bytes an access, all loads of a
// thread in flight together; other tiles go element by element through the same order.
#pragma once

#include "sums.h"

namespace orthonorm::cuda {

inline constexpr int threads = 256;

// Whether list k is of integers: known when a kernel is compiled.
template <class Op>
__device__ constexpr bool integer(int k) {
  if constexpr (requires { Op::integers; }) return Op::integers >> k & 1;
  return false;
}

// Runs of eight elements of a thread.
template <int N>
inline constexpr int runs = N <= 2 ? 2 : 1;

template <int N>
inline constexpr int64_t tile_of = int64_t{8} * threads * runs<N>;

// Where matrix b of an entry lies.
template <int N>
struct Matrix {
  char* data[N];
  int64_t place;            // of its first element in list 0
  const Layout<N>* layout;  // null: its elements are consecutive
  bool aligned = true, narrow = false;  // all at 16 bytes; any of two bytes an element

  __device__ Matrix(const Table<N>& table, const Entry<N>& entry, int64_t b) {
    layout = entry.layout < 0 ? nullptr : &table.layouts[entry.layout];
    place = entry.place + b * (layout ? layout->batch[0] : entry.count);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const int64_t skip = layout ? layout->batch[k] : entry.count;
      data[k] = entry.data[k] + b * skip * size_of(entry.type[k]);
      aligned = aligned && reinterpret_cast<uintptr_t>(data[k]) % 16 == 0;
      narrow = narrow || size_of(entry.type[k]) == 2;
    }
    if (layout && layout->dense) layout = nullptr;
  }

  __device__ int64_t offset(int k, int64_t i) const {
    if (!layout) return i;
    const int64_t row = i / layout->columns;
    return row * layout->row[k] + (i - row * layout->columns) * layout->column[k];
  }
};

// Where in a tile a thread's runs of eight elements are: two runs of four, side by side where 16
// bytes hold eight elements, else a block's width apart, so that neighbours in a warp move
// neighbouring 16 bytes either way.
struct Places {
  int own, gap;

  __device__ explicit Places(bool narrow)
      : own(static_cast<int>(threadIdx.x) * (narrow ? 8 : 4)), gap(narrow ? 4 : 4 * threads) {}
  __device__ int first(int run) const { return run * 8 * threads + own; }
  __device__ int second(int run) const { return first(run) + gap; }
};

template <class Op, class A>
__device__ void whole_run(const typename Op::template Constants<A>& c,
                          const Entry<Op::lists>& entry, const Matrix<Op::lists>& matrix,
                          int64_t start, const Places& places, Adder<Op::measure, A>& sum) {
  constexpr int N = Op::lists;
  Eight<A> raw[runs<N>][N];
#pragma unroll
  for (int r = 0; r < runs<N>; ++r) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (!(Op::reads >> k & 1)) continue;
      const char* at = matrix.data[k] + start * size_of(entry.type[k]);
      raw[r][k].load(at, entry.type[k], places.first(r), places.second(r));
    }
  }
#pragma unroll
  for (int r = 0; r < runs<N>; ++r) {
    A values[N][8];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (Op::reads >> k & 1) raw[r][k].get(entry.type[k], values[k], integer<Op>(k));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      A x[N];
#pragma unroll
      for (int k = 0; k < N; ++k) x[k] = Op::reads >> k & 1 ? values[k][i] : A(0);
      const int inside = i < 4 ? places.first(r) + i : places.second(r) + i - 4;
      const auto measured = Op::template apply<A>(c, x, matrix.place + start + inside);
      if constexpr (Op::measure != Measure::nothing) sum.add(measured);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (Op::writes >> k & 1) values[k][i] = x[k];
      }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (!(Op::writes >> k & 1)) continue;
      raw[r][k].put(entry.type[k], values[k], integer<Op>(k));
      char* at = matrix.data[k] + start * size_of(entry.type[k]);
      raw[r][k].store(at, entry.type[k], places.first(r), places.second(r));
    }
  }
}

// The same elements one by one, as far as there are any.
template <class Op, class A>
__device__ void any_run(const typename Op::template Constants<A>& c,
                        const Entry<Op::lists>& entry, const Matrix<Op::lists>& matrix,
                        int64_t start, int first, int second, Adder<Op::measure, A>& sum) {
  constexpr int N = Op::lists;
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const int64_t at = start + (i < 4 ? first + i : second + i - 4);
    if (at >= entry.count) continue;
    A x[N];
    char* address[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      address[k] = matrix.data[k] + matrix.offset(k, at) * size_of(entry.type[k]);
      x[k] = Op::reads >> k & 1 ? load<A>(address[k], entry.type[k], integer<Op>(k)) : A(0);
    }
    const auto measured = Op::template apply<A>(c, x, matrix.place + matrix.offset(0, at));
    if constexpr (Op::measure != Measure::nothing) sum.add(measured);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (Op::writes >> k & 1) store(address[k], entry.type[k], x[k], integer<Op>(k));
    }
  }
}

template <class Op, class A>
__global__ void __launch_bounds__(threads)
    elementwise_kernel(ORTHONORM_CONSTANT(Table<Op::lists>) table, ORTHONORM_CONSTANT(Op) op,
                       typename Adder<Op::measure, A>::Total* sums) {
  constexpr int N = Op::lists;
  if constexpr (Op::measure == Measure::nothing && requires { op.found_inf; }) {
    if (op.found_inf.read() != 0) return;
  }
  const Entry<N>& entry = locate<&Entry<N>::first_tile>(table, blockIdx.x);
  const uint32_t inside = blockIdx.x - entry.first_tile;
  const int64_t b = inside / entry.tiles;
  const int64_t start = (inside % entry.tiles) * tile_of<N>;
  const Matrix<N> matrix(table, entry, b);
  const auto c = op.template prepare<A>(entry, entry.first + b);
  const Places places(matrix.narrow);
  Adder<Op::measure, A> sum;
  if (matrix.aligned && !matrix.layout && start + tile_of<N> <= entry.count) {
    whole_run<Op, A>(c, entry, matrix, start, places, sum);
  } else {
    for (int r = 0; r < runs<N>; ++r) {
      any_run<Op, A>(c, entry, matrix, start, places.first(r), places.second(r), sum);
    }
  }
  if constexpr (Op::measure != Measure::nothing) {
    const auto total = block_sum<threads>(sum.total());
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
  }
}

// ---- host --------------------------------------------------------------------------------------

// Lists whose tables are launched with `op`, and a result for every matrix where it measures.
template <class Op>
Lists<Op::lists> elementwise(const Device& device, Unit unit, const Op& op,
                             double* results = nullptr) {
  constexpr int N = Op::lists;
  constexpr bool measures = Op::measure != Measure::nothing;
  using Total = typename Adder<Op::measure, float>::Total;
  return Lists<N>(unit, tile_of<N>, [&device, op, results](const Table<N>& table, bool wide) {
    Total* sums = measures ? device.scratch<Total>(table.tiles) : nullptr;
    launch(wide ? elementwise_kernel<Op, double> : elementwise_kernel<Op, float>, table.tiles,
           threads, 0, device, table, op, sums);
    if constexpr (measures) {
      launch(results_kernel<N, Op::measure>, table.matrices, 256, 0, device, table, sums, results);
    }
  });
}

}  // namespace orthonorm::cuda
