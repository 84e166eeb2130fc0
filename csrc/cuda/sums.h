// Sums over a block's threads in one fixed order, and norms of matrices from their tiles' sums.
#pragma once

#include "../magnitude.h"
#include "table.h"

namespace orthonorm::cuda {

inline constexpr int warp = 32;

__device__ inline int from_lane(int x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
__device__ inline float from_lane(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
__device__ inline double from_lane(double x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
__device__ inline SquareSum from_lane(const SquareSum& x, int mask) {
  return {__shfl_xor_sync(~0u, x.sum, mask), __shfl_xor_sync(~0u, x.exponent, mask)};
}

// The sum of all lanes, in every lane. Addition commutes, so all get the same bits.
template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int mask = warp / 2; mask > 0; mask /= 2) x = x + from_lane(x, mask);
  return x;
}

// The sum of all threads of a block of whole warps, in thread 0; every thread must call it.
template <int threads, class T>
__device__ inline T block_sum(T x) {
  constexpr int warps = threads / warp;
  ORTHONORM_SHARED(T, sums, warps);
  x = warp_sum(x);
  const int thread = threadIdx.x;
  if (thread % warp == 0) sums[thread / warp] = x;
  __syncthreads();
  if (thread == 0) {
    for (int i = 1; i < warps; ++i) x = x + sums[i];
  }
  return x;
}

// x^2, measured against x's own power of two.
__device__ inline SquareSum square(double x) {
  const int biased = static_cast<int>(bit_cast<uint64_t>(x) >> 52 & 2047);
  int64_t exponent = biased - 1022;
  if (exponent < SquareSum::lowest) exponent = SquareSum::lowest;
  if (exponent > SquareSum::highest) exponent = SquareSum::highest;
  if (biased == 2047) exponent = 0;
  const double unit = x * power_of_two(-exponent);
  return {unit * unit, exponent};
}

// What a pass measures of every matrix, in double, from what its op returns for every element.
enum class Measure { nothing, norm, sum };

// What one thread adds up, and what a matrix's total means.
template <Measure measure, class A>
struct Adder {
  using Total = double;
  double sum = 0;

  __device__ void add(double x) { sum += x; }
  __device__ double total() const { return sum; }
  __device__ static double result(double total) { return total; }
};

// Squares: of floats exactly, in double, of doubles against their peak so far.
template <>
struct Adder<Measure::norm, float> {
  using Total = SquareSum;
  double sum = 0;

  __device__ void add(float x) {
    const double wide = static_cast<double>(x);
    sum = std::fma(wide, wide, sum);
  }
  __device__ SquareSum total() const { return {sum, 0}; }
  __device__ static double result(const SquareSum& total) { return total.norm(); }
};

template <>
struct Adder<Measure::norm, double> {
  using Total = SquareSum;
  SquareSum sum;

  __device__ void add(double x) { sum = sum + square(x); }
  __device__ SquareSum total() const { return sum; }
  __device__ static double result(const SquareSum& total) { return total.norm(); }
};

// results[first + b] of every matrix of a table, a block each, from the sums of its tiles in order.
template <int N, Measure measure>
__global__ void __launch_bounds__(256)
    results_kernel(ORTHONORM_CONSTANT(Table<N>) table,
                   const typename Adder<measure, float>::Total* sums, double* results) {
  using Sum = Adder<measure, float>;
  const Entry<N>& entry = locate<&Entry<N>::slot>(table, blockIdx.x);
  const int64_t b = blockIdx.x - entry.slot;
  const auto* own = sums + entry.first_tile + b * entry.tiles;
  typename Sum::Total total{};
  for (uint32_t i = threadIdx.x; i < entry.tiles; i += 256) total = total + own[i];
  total = block_sum<256>(total);
  if (threadIdx.x == 0) results[entry.first + b] = Sum::result(total);
}

}  // namespace orthonorm::cuda
