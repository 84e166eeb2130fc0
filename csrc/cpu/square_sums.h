// Sums of squares over runs of values as they lie in memory; torch-free.
//
// Squares are added up in double, where squares of floats are exact, in an order that is the same
// for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "../elements.h"
#include "../magnitude.h"
#include "isa.h"

namespace orthonorm {

// Eight values as doubles. Loops that only read are written with these, so that memory is read line
// after line: what GCC 12 makes of plain loops skips to and fro, which no hardware prefetcher
// follows (row sums of 340 MB on one thread, 2026-11: 19.4 ms; so 11.4 ms; plain reading 9.6 ms).
using Eight = double __attribute__((vector_size(64)));

#if ORTHONORM_X86
// GCC 12 itself converts floats in halves and puts them together, which takes three times as long.
ORTHONORM_AVX512 inline void load_eight_avx512(const float* x, Eight& v) {
  v = reinterpret_cast<Eight>(_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x)));
}
ORTHONORM_AVX512 inline void load_eight_avx512(const Bf16* x, Eight& v) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  const __m256 floats = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  v = reinterpret_cast<Eight>(_mm512_maskz_cvtps_pd(0xff, floats));
}
ORTHONORM_AVX512 inline void load_eight_avx512(const Fp16* x, Eight& v) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  v = reinterpret_cast<Eight>(_mm512_maskz_cvtps_pd(0xff, _mm256_cvtph_ps(halves)));
}
#endif

template <Isa set, class T>
inline void load_eight(const T* x, Eight& v) {
#if ORTHONORM_X86
  if constexpr (set == Isa::avx512 && sizeof(T) < 8) return load_eight_avx512(x, v);
#endif
  if constexpr (sizeof(T) == 8) {
    std::memcpy(&v, x, sizeof(v));
  } else {
    float __attribute__((vector_size(32))) floats;
    for (int k = 0; k < 8; ++k) floats[k] = widen(x[k]);
    v = __builtin_convertvector(floats, Eight);
  }
}

// The sum of interleaved sums, upper half onto lower half.
template <int64_t lanes>
inline double fold(double* sums) {
  if constexpr (lanes > 1) {
    for (int64_t lane = 0; lane < lanes / 2; ++lane) sums[lane] += sums[lane + lanes / 2];
    return fold<lanes / 2>(sums);
  }
  return sums[0];
}

// Fetches a line that is needed some kilobytes later. Into the second cache: the first one, of
// 32 KB on many processors, would lose it again to a tile's sums and factors before it is used
// (column sums of 170 MB on one thread of Zen 4, 8 runs at a time, 2026-11: 9.1 to 10.7 ms into the
// first, 7.2 to 7.9 into the second).
inline void prefetch_l2(const char* address) { __builtin_prefetch(address, 0, 2); }

// R runs of values, and how many bytes behind each of them lies what will be read next (0:
// unknown). The hardware prefetcher stops at every page and follows few runs at once; column sums
// of 340 MB on two threads took 11.5 ms without and take 7.2 ms with it done by hand (2026-11).
template <int R, class T>
struct Rows {
  const T* at[R];
  int64_t ahead = 0;

  // Fetches what lies ahead of elements [j, j + 8).
  void prefetch(int r, int64_t j) const {
    if (ahead == 0 || j * sizeof(T) % 64 != 0) return;
    prefetch_l2(reinterpret_cast<const char*>(at[r] + j) + ahead);
  }
};

// Adds the squares of elements [begin, end) of one run, whole 32 of them, to 32 interleaved sums.
template <Isa set, class T>
inline void add_run(const Rows<1, T>& x, int64_t begin, int64_t end, Eight* sums) {
  Eight v;
  for (int64_t i = begin; i + 32 <= end; i += 32) {
    for (int64_t k = 0; k < 4; ++k) {
      x.prefetch(0, i + 8 * k);
      load_eight<set>(x.at[0] + i + 8 * k, v);
      sums[k] += v * v;
    }
  }
}

// The total of these sums and of the elements behind the last whole 32 of `count`.
template <class T>
inline double finish_run(const Rows<1, T>& x, int64_t count, const Eight* sums) {
  double lanes[32];
  std::memcpy(lanes, sums, sizeof(lanes));
  for (int64_t i = count - count % 32, lane = 0; i < count; ++i, ++lane) {
    const double value = widen(x.at[0][i]);
    lanes[lane] += value * value;
  }
  return fold<32>(lanes);
}

template <class T>
inline double sum_squares(const Rows<1, T>& x, int64_t count) {
  double result;
  specialized([=, &result]<Isa set>(For<set>) {
    Eight sums[4] = {};
    add_run<set>(x, 0, count, sums);
    result = finish_run(x, count, sums);
  });
  return result;
}

// float64, to which squares may be too large or too small.
inline SquareSum sum_squares(const Rows<1, double>& x, int64_t count) {
  SquareSum sum;
  specialized([=, &sum] { sum = square_sum(x.at[0], count); });
  return sum;
}

// sums_j += x_rj^2, run after run.
template <int R, class T>
inline void add_squares(const Rows<R, T>& x, int64_t count, double* sums) {
  specialized([=]<Isa set>(For<set>) {
    int64_t j = 0;
    for (; j + 8 <= count; j += 8) {
      Eight sum, v;
      std::memcpy(&sum, sums + j, sizeof(sum));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        x.prefetch(r, j);
        load_eight<set>(x.at[r] + j, v);
        sum += v * v;
      }
      std::memcpy(sums + j, &sum, sizeof(sum));
    }
    for (; j < count; ++j) {
      for (int r = 0; r < R; ++r) {
        const double value = widen(x.at[r][j]);
        sums[j] += value * value;
      }
    }
  });
}

inline void add_to(double* sums, const double* more, int64_t count) {
  specialized([=] {
    for (int64_t j = 0; j < count; ++j) sums[j] += more[j];
  });
}

}  // namespace orthonorm
