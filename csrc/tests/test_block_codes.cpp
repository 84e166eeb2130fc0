// The codes of block_codes.h against their definition: the number of means of neighbouring values
// that lie below, for every float at which the table or the answer changes, and its neighbours; and
// AdamW on blocks of codes.
//
//   g++ -std=c++20 -O1 -g -fsanitize=address,undefined -Icsrc csrc/tests/test_block_codes.cpp
#include "coded_adamw_step.h"

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
    const float edge = (map.value(i) + map.value(i + 1)) / 2;
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
    CHECK(map.code(map.value(i)) == i, "value %d has code %d", i, map.code(map.value(i)));
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
    const float edge = (map.value(i) + map.value(i + 1)) / 2;
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

// A step on codes is reading them, a step on floats, and writing them, to the bit.
template <class A>
void test_step() {
  const CodeMap &first = CodeMap::of(true), &second = CodeMap::of(false);
  std::mt19937 engine(3);
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> any(0, 255);
  const AdamWStep<A> c(AdamWStep<double>({1e-2, 0.9, 0.99, 1e-8, 0.1, true, true, 3}, 5));
  for (const int64_t n : {1, 2, 15, 16, 17, 100, 255, 256}) {
    for (const float size : {1.0f, 1e-42f, 1e36f, 0.0f, nan, inf}) {
      std::vector<A> w(n), g(n), m(n), v(n);
      std::vector<uint8_t> m_codes(n), v_codes(n);
      std::vector<float> m_floats(n), v_floats(n);
      for (int64_t i = 0; i < n; ++i) {
        w[i] = normal(engine), g[i] = normal(engine) * (std::isfinite(size) ? size : 1);
        m[i] = m_codes[i] = static_cast<uint8_t>(any(engine));
        v[i] = v_codes[i] = static_cast<uint8_t>(any(engine));
      }
      if (!std::isfinite(size)) g[n / 2] = size;
      const BlockScales before{0.5f, 0.25f};
      BlockScales scales = before;
      std::vector<A> after = w;
      specialized([&] {
        coded_adamw_step(c, after.data(), g.data(), m.data(), v.data(), scales, n);
      });
      decode_block(first, m_codes.data(), before.exp_avg, n, m_floats.data());
      decode_block(second, v_codes.data(), before.exp_avg_sq, n, v_floats.data());
      for (int64_t i = 0; i < n; ++i) {
        A x = m_floats[i], y = v_floats[i];
        adamw_step(c, w[i], g[i], x, y);
        m_floats[i] = static_cast<float>(x), v_floats[i] = static_cast<float>(y);
        CHECK(after[i] == w[i] || (std::isnan(after[i]) && std::isnan(w[i])),
              "weight %g instead of %g", static_cast<double>(after[i]), static_cast<double>(w[i]));
      }
      const float m_scale = encode_block(first, m_floats.data(), n, m_codes.data());
      const float v_scale = encode_block(second, v_floats.data(), n, v_codes.data());
      CHECK(bit_cast<int32_t>(m_scale) == bit_cast<int32_t>(scales.exp_avg) &&
                bit_cast<int32_t>(v_scale) == bit_cast<int32_t>(scales.exp_avg_sq),
            "scales %g and %g", scales.exp_avg, scales.exp_avg_sq);
      for (int64_t i = 0; i < n; ++i) {
        CHECK(m[i] == m_codes[i] && v[i] == v_codes[i], "codes of %g", static_cast<double>(g[i]));
      }
    }
  }
}

}  // namespace

int main() {
  test_step<float>();
  test_step<double>();
  for (const bool is_signed : {true, false}) {
    test_values(is_signed);
    test_codes(is_signed);
    test_blocks(is_signed);
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
