// Codes of 8 bits and scales of lists of matrices.
#include "code_lists.h"

namespace orthonorm {
namespace {

// The elements of a block as floats: their own memory or a copy.
const float* fetch(const Coded& m, int64_t first, int64_t count, float* scratch) {
  if (m.x.packed) return load(m.x.data + first * m.x.size, m.dtype, 1, count, scratch);
  m.x.runs(first, count, [&](const char* from, int64_t stride, int64_t done, int64_t length) {
    load_into(from, m.dtype, stride, length, scratch + done);
  });
  return scratch;
}

void quantize_blocks_(const TensorList& codes, const TensorList& scales, const TensorList& X,
                      bool is_signed) {
  const CodeLists lists("quantize_blocks_", "X", X, codes, scales, false);
  const CodeMap& map = CodeMap::of(is_signed);
  lists.run([&](const Coded& m, int64_t block, int64_t first, int64_t count) {
    alignas(64) float scratch[code_block];
    uint8_t made[code_block];
    const float* const x = fetch(m, first, count, scratch);
    uint8_t* const own = reinterpret_cast<uint8_t*>(m.codes.data) + first;
    uint8_t* const to = m.codes.packed ? own : made;
    float scale;
    specialized([&] { scale = encode_block(map, x, count, to); });
    store(&scale, m.scale(block), m.scale_dtype, 1, 1);
    if (m.codes.packed) return;
    m.codes.runs(first, count, [&](char* at, int64_t stride, int64_t done, int64_t length) {
      for (int64_t i = 0; i < length; ++i) at[i * stride] = static_cast<char>(made[done + i]);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("quantize_blocks_", TORCH_BOX(&quantize_blocks_));
}

}  // namespace orthonorm
