// Two rows of bfloat16 joined along the depth, as vdpbf16ps and AMX's tiles multiply; torch-free.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

#if ORTHONORM_X86

namespace orthonorm {

struct Pairs {
  __m512i first, last;  // of columns 0 to 15 and 16 to 31
};

// Lane j: even[j] in the low half, odd[j] in the high half.
ORTHONORM_AVX512BF16 [[gnu::always_inline]] inline Pairs join_rows(__m512i even, __m512i odd) {
  alignas(64) static constexpr uint16_t order[2][32] = {
      {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  return {_mm512_permutex2var_epi16(even, _mm512_load_si512(order[0]), odd),
          _mm512_permutex2var_epi16(even, _mm512_load_si512(order[1]), odd)};
}

}  // namespace orthonorm

#endif  // ORTHONORM_X86
