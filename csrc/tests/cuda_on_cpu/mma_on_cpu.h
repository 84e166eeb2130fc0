// cuda/mma.h on the CPU: every lane shows the others its fragments, laid out as the PTX ISA has it.
#pragma once

#include "cuda/elements.h"

namespace orthonorm::cuda {

namespace emulated {

// Lane `lane`'s pair of each of four 8 x 8 matrices, the rows of which all lanes know.
inline void load(uint32_t (&to)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    std::fprintf(stderr, "cuda_on_cpu: misaligned address of a matrix's row\n");
    std::abort();
  }
  const auto rows = cuda_on_cpu::shown(row);
  const unsigned lane = cuda_on_cpu::here().lane(), first = lane / 4, second = 2 * (lane % 4);
  for (unsigned i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (unsigned k = 0; k < 2; ++k) {
      const unsigned r = transposed ? second + k : first, c = transposed ? first : second + k;
      pair[k] = static_cast<const uint16_t*>(rows[8 * i + r])[c];
    }
    std::memcpy(&to[i], pair, sizeof pair);
  }
}

struct Factors {
  uint32_t left[4], right[2];
};

template <class T>
float half_of(uint32_t pair, unsigned k) {
  return widen(T{static_cast<uint16_t>(pair >> 16 * k)});
}

}  // namespace emulated

inline void load_matrices(uint32_t (&to)[4], const void* row) { emulated::load(to, row, false); }
inline void load_transposes(uint32_t (&to)[4], const void* row) { emulated::load(to, row, true); }

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  emulated::Factors own{{left[0], left[1], left[2], left[3]}, {right0, right1}};
  const auto all = cuda_on_cpu::shown(own);
  const unsigned lane = cuda_on_cpu::here().lane();
  for (unsigned k = 0; k < 16; ++k) {
    const unsigned column = k % 8 / 2;
    const emulated::Factors at_left = all[lane / 4 * 4 + column];
    for (unsigned i = 0; i < 4; ++i) {  // rows lane / 4 and 8 more, columns 2 (lane % 4) and 1 more
      const emulated::Factors at_right = all[(2 * (lane % 4) + i % 2) * 4 + column];
      sums[i] += emulated::half_of<T>(at_left.left[i / 2 + 2 * (k / 8)], k % 2) *
                 emulated::half_of<T>(at_right.right[k / 8], k % 2);
    }
  }
}

}  // namespace orthonorm::cuda
