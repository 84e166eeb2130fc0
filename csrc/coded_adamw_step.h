// One block of `coded_adamw_step_`; torch-free.
#pragma once

#include "adamw_step.h"
#include "block_codes.h"

namespace orthonorm {

struct BlockScales {
  float exp_avg, exp_avg_sq;
};

// AdamW on `count` <= code_block weights. Codes of the two averages are numbers of the arithmetic
// here; they and the scales are read, and written anew.
template <class A>
inline void coded_adamw_step(const AdamWStep<A>& c, A* __restrict w, const A* __restrict g,
                             A* __restrict exp_avg, A* __restrict exp_avg_sq, BlockScales& scales,
                             int64_t count) {
  alignas(64) float first[code_block], second[code_block];
  const CodeMap &with_sign = CodeMap::of(true), &without = CodeMap::of(false);
  decode_block(with_sign, exp_avg, scales.exp_avg, count, first);
  decode_block(without, exp_avg_sq, scales.exp_avg_sq, count, second);
  for (int64_t i = 0; i < count; ++i) {
    A m = first[i], v = second[i];
    adamw_step(c, w[i], g[i], m, v);
    first[i] = static_cast<float>(m);
    second[i] = static_cast<float>(v);
  }
  scales.exp_avg = encode_block(with_sign, first, count, exp_avg);
  scales.exp_avg_sq = encode_block(without, second, count, exp_avg_sq);
}

}  // namespace orthonorm
