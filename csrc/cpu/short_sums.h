// Weighted sums over runs, added up in float before double takes them over; torch-free.
//
// Every element converted to double for three sums took most of `factored_moment_`'s time. In
// float, and promoted once in 32 runs, sums along and over the runs of 340 MB take as long as
// reading them (two threads, 2026-11: 9.3 ms where reading takes 9.5; promoted once in 8 runs 10.4,
// as promoting costs what adding eight does). The error is that of adding 32 floats, and averages
// out over a matrix. Where squares, weights or sums leave the range in which that holds, and where
// float64 would show that error, sums are double's.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "square_sums.h"

namespace orthonorm {

using Sixteen = float __attribute__((vector_size(64)));

#if ORTHONORM_X86
ORTHONORM_AVX512 inline void load_sixteen_avx512(const float* x, Sixteen& v) {
  v = reinterpret_cast<Sixteen>(_mm512_loadu_ps(x));
}
ORTHONORM_AVX512 inline void load_sixteen_avx512(const Bf16* x, Sixteen& v) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  v = reinterpret_cast<Sixteen>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
ORTHONORM_AVX512 inline void load_sixteen_avx512(const Fp16* x, Sixteen& v) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  v = reinterpret_cast<Sixteen>(_mm512_maskz_cvtph_ps(0xffff, halves));
}
#endif

template <Isa set, class T>
inline void load_sixteen(const T* x, Sixteen& v) {
#if ORTHONORM_X86
  if constexpr (set == Isa::avx512) return load_sixteen_avx512(x, v);
#endif
  float values[16];
  for (int k = 0; k < 16; ++k) values[k] = widen(x[k]);
  std::memcpy(&v, values, sizeof(v));
}

// Whether sums of squares lost nothing to the ends of float's range: a square that vanished is
// below 2^-149. Floats that are not negative order like their bits, NaN above all, and minima
// vectorize where conditions do not.
inline bool fits_float(const float* sums, int64_t count) {
  uint32_t least = UINT32_MAX, most = 0;
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t bits = bit_cast<uint32_t>(sums[j]);
    least = std::min(least, bits), most = std::max(most, bits);
  }
  return bit_cast<float>(least) >= 0x1p-100f && bit_cast<float>(most) <= FLT_MAX;
}

// Squares of R runs are summed plainly and with two weights of each run.
template <int R>
struct Weights {
  double first[R], second[R];
};

struct WeightedSums {
  double *plain, *first, *second;
};

// Weights as floats, in units of a power of two near the largest of them.
template <int R>
struct ShortWeights {
  float at[R];
  double unit = 1;
  bool fit = true;  // no weight vanishes, none is infinite

  explicit ShortWeights(const double* weights) {
    const double most = *std::max_element(weights, weights + R);
    if (most > 0 && most <= DBL_MAX) unit = std::ldexp(1.0, std::ilogb(most));
    for (int r = 0; r < R; ++r) {
      const double scaled = weights[r] / unit;
      fit &= (scaled == 0) | ((scaled >= 0x1p-100) & (scaled < 2));
      at[r] = static_cast<float>(scaled);
    }
  }
};

// Elements [begin, end) in double.
template <Isa set, int R, class T>
inline void add_weighted_exactly(const Rows<R, T>& x, const Weights<R>& weights, int64_t begin,
                                 int64_t end, const WeightedSums& to) {
  int64_t j = begin;
  for (; j + 8 <= end; j += 8) {
    Eight plain, first, second, v;
    std::memcpy(&plain, to.plain + j, sizeof(plain));
    std::memcpy(&first, to.first + j, sizeof(first));
    std::memcpy(&second, to.second + j, sizeof(second));
    for (int r = 0; r < R; ++r) {
      load_eight<set>(x.at[r] + j, v);
      v *= v;
      plain += v;
      first += weights.first[r] * v;
      second += weights.second[r] * v;
    }
    std::memcpy(to.plain + j, &plain, sizeof(plain));
    std::memcpy(to.first + j, &first, sizeof(first));
    std::memcpy(to.second + j, &second, sizeof(second));
  }
  for (; j < end; ++j) {
    for (int r = 0; r < R; ++r) {
      const double value = widen(x.at[r][j]), square = value * value;
      to.plain[j] += square;
      to.first[j] += weights.first[r] * square;
      to.second[j] += weights.second[r] * square;
    }
  }
}

// Adds up `count` columns, whole sixteens of them, eight runs at a time.
template <Isa set, int R, class T>
inline void short_sums(const Rows<R, T>& x, const float* first, const float* second, int64_t begin,
                       int64_t count, float (*sums)[256]) {
  constexpr int G = R < 8 ? R : 8;
  for (int g = 0; g < R; g += G) {
    Sixteen a[G], b[G];
    for (int r = 0; r < G; ++r) a[r] = Sixteen{} + first[g + r], b[r] = Sixteen{} + second[g + r];
    for (int64_t j = 0; j < count; j += 16) {
      Sixteen total[3] = {}, v;
      for (int s = 0; g > 0 && s < 3; ++s) std::memcpy(&total[s], sums[s] + j, sizeof(v));
      for (int r = 0; r < G; ++r) {
        load_sixteen<set>(x.at[g + r] + begin + j, v);
        v *= v;
        total[0] += v;
        total[1] += a[r] * v;
        total[2] += b[r] * v;
      }
      for (int s = 0; s < 3; ++s) std::memcpy(sums[s] + j, &total[s], sizeof(v));
    }
  }
}

// to_j += the sums over the runs of x_rj^2, plain and weighted; `exactly`: in double throughout.
template <int R, class T>
inline void add_weighted_squares(const Rows<R, T>& x, const Weights<R>& weights, int64_t count,
                                 const WeightedSums& to, bool exactly) {
  if constexpr (sizeof(T) == 8) {
    return specialized([=]<Isa set>(For<set>) {
      add_weighted_exactly<set>(x, weights, 0, count, to);
    });
  } else {
    const ShortWeights<R> first(weights.first), second(weights.second);
    const bool fit = !exactly && first.fit && second.fit;
    specialized([=]<Isa set>(For<set>) {
      alignas(64) float sums[3][256];
      const int64_t whole = fit ? count - count % 16 : 0;
      for (int64_t i = 0; i < whole; i += 256) {
        const int64_t width = std::min<int64_t>(256, whole - i);
        short_sums<set>(x, first.at, second.at, i, width, sums);
        bool held = true;
        for (const float* part : sums) held = held && fits_float(part, width);
        if (!held) {
          add_weighted_exactly<set>(x, weights, i, i + width, to);
          continue;
        }
        for (int64_t j = 0; j < width; ++j) to.plain[i + j] += sums[0][j];
        for (int64_t j = 0; j < width; ++j) to.first[i + j] += first.unit * sums[1][j];
        for (int64_t j = 0; j < width; ++j) to.second[i + j] += second.unit * sums[2][j];
      }
      add_weighted_exactly<set>(x, weights, whole, count, to);
    });
  }
}

}  // namespace orthonorm
