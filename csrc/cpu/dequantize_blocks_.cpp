// Lists of matrices from their codes of 8 bits and scales.
#include "code_lists.h"

namespace orthonorm {
namespace {

// The codes of a block: their own memory or a copy.
const uint8_t* fetch(const Coded& m, int64_t first, int64_t count, uint8_t* scratch) {
  if (m.codes.packed) return reinterpret_cast<const uint8_t*>(m.codes.data) + first;
  m.codes.runs(first, count, [&](const char* from, int64_t stride, int64_t done, int64_t length) {
    for (int64_t i = 0; i < length; ++i) {
      scratch[done + i] = static_cast<uint8_t>(from[i * stride]);
    }
  });
  return scratch;
}

void dequantize_blocks_(const TensorList& out, const TensorList& codes, const TensorList& scales,
                        bool is_signed) {
  const CodeLists lists("dequantize_blocks_", "out", out, codes, scales, true);
  const CodeMap& map = CodeMap::of(is_signed);
  lists.run([&](const Coded& m, int64_t block, int64_t first, int64_t count) {
    alignas(64) float scratch[code_block];
    uint8_t gathered[code_block];
    const uint8_t* const given = fetch(m, first, count, gathered);
    float scale;
    load_into(m.scale(block), m.scale_dtype, 1, 1, &scale);
    float* to = scratch;
    if (m.x.packed) to = target(m.x.data + first * m.x.size, m.dtype, 1, scratch);
    specialized([&] { decode_block(map, given, scale, count, to); });
    if (m.x.packed) return store(to, m.x.data + first * m.x.size, m.dtype, 1, count);
    m.x.runs(first, count, [&](char* at, int64_t stride, int64_t done, int64_t length) {
      store(scratch + done, at, m.dtype, stride, length);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("dequantize_blocks_", TORCH_BOX(&dequantize_blocks_));
}

}  // namespace orthonorm
