// Block-wise dynamic codes of 8 bits, as `ops/blocks.py` defines them; torch-free.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "elements.h"

namespace orthonorm {

inline constexpr int64_t code_block = 256;  // elements that share a scale

// The 256 values of one map, and what finds the nearest of them.
//
// The code of y is the number of edges below it, edges being the means of neighbouring values. The
// upper 16 bits of |y| leave it an interval with one edge at most. A table has for every interval
// how many edges lie below it, and the lower 16 bits of its edge: one look-up and one comparison of
// integers, in loops that vectorize. Of the table the part in use is some 11 KB.
class CodeMap {
 public:
  static const CodeMap& of(bool is_signed) {
    static const CodeMap both[2] = {CodeMap(false), CodeMap(true)};
    return both[is_signed];
  }

  float value(int32_t code) const { return values_[code]; }
  const float* values() const { return values_.data(); }

  // The code of |y| <= 1, or of NaN the last one. Values are symmetric around 0 but for the last,
  // 1, so that edges below -y are those above y. A negative y has the code of 0 where the map has
  // no signs.
  int32_t code(float y) const { return found(y, table_[place(y)], zero_); }

  // The same of `count` <= code_block numbers, x / scale: vectors but for the look-ups, as what
  // gathers cost differs widely among processors.
  template <class Code>
  void codes(const float* x, float scale, int64_t count, Code* __restrict to) const {
    alignas(64) float y[code_block];
    alignas(64) int32_t at[code_block];
    const int32_t zero = zero_;
    for (int64_t i = 0; i < count; ++i) {
      y[i] = x[i] / scale;
      at[i] = place(y[i]);
    }
    const int32_t* const table = table_.data();
    for (int64_t i = 0; i < count; ++i) at[i] = table[at[i]];
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Code>(found(y[i], at[i], zero));
  }

 private:
  static constexpr int32_t upper_of_one = 0x3f80, no_edge = 0x1ffff;

  static int32_t place(float y) {
    return std::min((bit_cast<int32_t>(y) & 0x7fffffff) >> 16, upper_of_one);
  }

  // By arithmetic alone, as compilers make branches of choices. A number shifted by 31 is -1 if it
  // is negative, else 0.
  static int32_t found(float y, int32_t interval, int32_t zero) {
    const int32_t bits = bit_cast<int32_t>(y), size = bits & 0x7fffffff, sign = bits >> 31;
    // on an edge the lower code: of a negative number the one away from 0
    const int32_t past = ((interval & no_edge) - (size & 0xffff) + sign) >> 31;
    const int32_t below = ((interval >> 17) - past) & (-size >> 31);
    const int32_t code = zero + ((below ^ sign) - sign);
    const int32_t nan = (0x7f800000 - size) >> 31;
    return (code & ~(code >> 31)) | (nan & 255);
  }

  explicit CodeMap(bool is_signed) : zero_(is_signed ? 127 : 0), table_(upper_of_one + 1) {
    constexpr double decades[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    int64_t made = 0;
    values_[made++] = 0.0f;
    values_[made++] = 1.0f;
    for (int64_t i = 0; i < 7; ++i) {
      const int64_t count = int64_t{1} << (is_signed ? i : i + 1);
      for (int64_t k = 0; k < count; ++k) {
        const double mean = 0.1 + 0.9 * (static_cast<double>(k) + 0.5) / static_cast<double>(count);
        values_[made++] = static_cast<float>(decades[i] * mean);
        if (is_signed) values_[made++] = static_cast<float>(-decades[i] * mean);
      }
    }
    std::sort(values_.begin(), values_.end());
    int32_t code = zero_, below = 0;
    if (!is_signed) ++code, ++below;  // what is positive is not rounded to 0
    for (int32_t upper = 0; upper <= upper_of_one; ++upper) {
      int32_t edge = no_edge;
      const int32_t before = below;
      for (; code < 255; ++code, ++below) {
        const int32_t bits = bit_cast<int32_t>((values_[code] + values_[code + 1]) / 2);
        if (bits >> 16 != upper) break;
        edge = bits & 0xffff;
      }
      table_[upper] = before << 17 | edge;
    }
  }

  std::array<float, 256> values_;
  int32_t zero_;
  std::vector<int32_t> table_;
};

// The largest magnitude; NaN if there is one.
inline float block_scale(const float* x, int64_t count) {
  int32_t peak = 0;  // magnitudes order like their bits, which the compiler can vectorize
  for (int64_t i = 0; i < count; ++i) {
    peak = std::max(peak, bit_cast<int32_t>(x[i]) & 0x7fffffff);
  }
  return bit_cast<float>(peak);
}

// The codes of a block of at most code_block elements, as numbers of any type, and its scale.
template <class Code>
inline float encode_block(const CodeMap& map, const float* x, int64_t count, Code* codes) {
  const float scale = block_scale(x, count);
  if (scale == 0) {
    std::fill(codes, codes + count, static_cast<Code>(map.code(0)));
    return scale;
  }
  map.codes(x, scale, count, codes);
  return scale;
}

template <class Code>
inline void decode_block(const CodeMap& map, const Code* codes, float scale, int64_t count,
                         float* x) {
  const float* const values = map.values();
  for (int64_t i = 0; i < count; ++i) x[i] = values[static_cast<int32_t>(codes[i])] * scale;
}

}  // namespace orthonorm
