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
// The code of y is the number of edges below it. The upper 16 bits of a float leave it an interval
// with one edge at most, so that the number of edges below the interval's least float, from a
// table of all of them, and one comparison give it: of [-1, 1] the table's part in use is 6 KB.
class CodeMap {
 public:
  static const CodeMap& of(bool is_signed) {
    static const CodeMap both[2] = {CodeMap(false), CodeMap(true)};
    return both[is_signed];
  }

  float value(uint8_t code) const { return values_[code]; }
  const float* values() const { return values_.data(); }

  // Of a NaN the last one.
  uint8_t code(float y) const {
    const uint8_t below = below_[bit_cast<uint32_t>(y) >> 16];
    return static_cast<uint8_t>(below + (y > edges_[below] ? 1 : 0));
  }

  // The same by counting, which the table is made with.
  int64_t count_below(float y) const {
    if (y != y) return 255;
    return std::lower_bound(edges_.begin(), edges_.begin() + 255, y) - edges_.begin();
  }

 private:
  explicit CodeMap(bool is_signed) : below_(65536) {
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
    for (int64_t i = 0; i < 255; ++i) edges_[i] = (values_[i] + values_[i + 1]) / 2;
    if (!is_signed) edges_[0] = 0;  // what is positive is not rounded to 0
    edges_[255] = 1;                // above all that is looked up
    for (uint32_t upper = 0; upper < 65536; ++upper) {
      const uint32_t least = upper << 16 | (upper >> 15 ? 0xffff : 0);  // of negative floats
      below_[upper] = static_cast<uint8_t>(
          (upper & 0x7f80) == 0x7f80 ? 255 : count_below(bit_cast<float>(least)));
    }
  }

  std::array<float, 256> values_, edges_;
  std::vector<uint8_t> below_;
};

// The largest magnitude; NaN if there is one.
inline float block_scale(const float* x, int64_t count) {
  int32_t peak = 0;  // magnitudes order like their bits, which the compiler can vectorize
  for (int64_t i = 0; i < count; ++i) {
    peak = std::max(peak, bit_cast<int32_t>(x[i]) & 0x7fffffff);
  }
  return bit_cast<float>(peak);
}

// The codes of a block of at most code_block elements, and its scale.
inline float encode_block(const CodeMap& map, const float* x, int64_t count, uint8_t* codes) {
  const float scale = block_scale(x, count);
  if (scale == 0) {
    std::fill(codes, codes + count, map.code(0));
    return scale;
  }
  alignas(64) float y[code_block];
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] / scale;
  for (int64_t i = 0; i < count; ++i) codes[i] = map.code(y[i]);
  return scale;
}

inline void decode_block(const CodeMap& map, const uint8_t* codes, float scale, int64_t count,
                         float* x) {
  const float* values = map.values();
  for (int64_t i = 0; i < count; ++i) x[i] = values[codes[i]] * scale;
}

}  // namespace orthonorm
