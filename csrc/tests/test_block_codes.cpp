// The codes of block_codes.h against their definition: the number of means of neighbouring values
// that lie below, for every float at which the table or the answer changes, and its neighbours.
//
//   g++ -std=c++20 -O1 -g -fsanitize=address,undefined -Icsrc csrc/tests/test_block_codes.cpp
#include "block_codes.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu/isa.h"
#include "tests/check.h"

using namespace orthonorm;

namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float inf = std::numeric_limits<float>::infinity();

int wanted(bool is_signed, float y) {
  const CodeMap& map = CodeMap::of(is_signed);
  int code = 0;
  for (int i = 0; i < 255; ++i) {
    const float edge =
        (map.value(i) + map.value(i + 1)) / 2;
    code += !(edge >= y);
  }
  return !is_signed && y > 0 && code == 0 ? 1 : code;
}

void test_values(bool is_signed) {
  const CodeMap& map = CodeMap::of(is_signed);
  for (int i = 0; i < 255; ++i) {
    const float a = map.value(i), b = map.value(i + 1);
    CHECK(a < b, "value %d: %g before %g", i, a, b);
  }
  CHECK(map.value(255) == 1, "the last is %g", map.value(255));
  CHECK(map.value(is_signed ? 127 : 0) == 0, "no zero in its place");
  CHECK(map.value(is_signed ? 128 : 1) == static_cast<float>(is_signed ? 5.5e-7 : 3.25e-7),
        "the least is %g", map.value(is_signed ? 128 : 1));
  for (int i = 0; i < 256; ++i) {
    const auto code = i;
    CHECK(map.code(map.value(code)) == i, "value %d has code %d", i, map.code(map.value(code)));
  }
}

void test_codes(bool is_signed) {
  const CodeMap& map = CodeMap::of(is_signed);
  std::vector<float> points{0.0f, -0.0f, 1.0f, -1.0f, nan, -nan, 1e-45f, -1e-45f, 1e-38f};
  for (uint32_t upper = 0; upper < 65536; ++upper) {
    const float low = bit_cast<float>(upper << 16), high = bit_cast<float>(upper << 16 | 0xffff);
    if (std::abs(low) <= 1 && std::abs(high) <= 1) points.push_back(low), points.push_back(high);
  }
  for (int i = 0; i < 255; ++i) {
    const auto code = i, next = i + 1;
    const float edge = (map.value(code) + map.value(next)) / 2;
    for (const float y : {edge, std::nextafter(edge, -2.0f), std::nextafter(edge, 2.0f)}) {
      points.push_back(y);
    }
  }
  std::mt19937 engine(1);
  std::uniform_real_distribution<float> exponent(-25, 0), sign(-1, 1);
  for (int i = 0; i < 20000; ++i) {
    points.push_back(std::copysign(std::exp2(exponent(engine)), sign(engine)));
  }
  for (const float y : points) {
    CHECK(map.code(y) == wanted(is_signed, y), "%a has code %d, not %d", y, map.code(y),
          wanted(is_signed, y));
  }
}

// Blocks of every length, with what is not finite, and alone as among others.
void test_blocks(bool is_signed) {
  const CodeMap& map = CodeMap::of(is_signed);
  std::mt19937 engine(2);
  std::normal_distribution<float> normal;
  for (int64_t n = 1; n <= code_block; ++n) {
    for (const float size : {1.0f, 1e-42f, 1e37f, 0.0f, nan, inf}) {
      std::vector<float> x(n), back(n);
      std::vector<uint8_t> codes(n);
      for (float& v : x) v = normal(engine) * (std::isfinite(size) ? size : 1);
      if (!std::isfinite(size)) x[n / 2] = size;
      float scale = -1, top = 0;
      bool bad = false;
      for (const float v : x) top = std::max(top, std::abs(v)), bad = bad || std::isnan(v);
      specialized([&] { scale = encode_block(map, x.data(), n, codes.data()); });
      CHECK(bad ? std::isnan(scale) : scale == top, "scale %g instead of %g", scale, top);
      specialized([&] { decode_block(map, codes.data(), scale, n, back.data()); });
      for (int64_t i = 0; i < n; ++i) {
        const int code = wanted(is_signed, scale == 0 ? 0 : x[i] / scale);
        CHECK(codes[i] == code, "code %d instead of %d", codes[i], code);
        const float value = map.value(codes[i]) * scale;
        CHECK(back[i] == value || (std::isnan(back[i]) && std::isnan(value)), "%g instead of %g",
              back[i], value);
      }
    }
  }
}

}  // namespace

int main() {
  for (const bool is_signed : {true, false}) {
    test_values(is_signed);
    test_codes(is_signed);
    test_blocks(is_signed);
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
