// Rows of W over a number, written while W is still in the cache; torch-free.
#pragma once

#include "power_rows.h"

namespace orthonorm::power {

// Where elements of the same type as W's go; strides in elements. No data: nowhere.
struct Target {
  void* data = nullptr;
  int64_t row_stride = 0, col_stride = 1;
};

// x / divisor, rounded once but for ties; what is not double goes through a double product.
template <class T>
inline void quotient(T x, double divisor, double inverse, T& to) {
  if constexpr (sizeof(T) == 8) {
    to = x / divisor;
  } else if constexpr (sizeof(T) == 4) {
    to = static_cast<T>(x * inverse);
  } else {
    narrow(to_odd(widen(x) * inverse), to);
  }
}

template <class T>
void divide_rows_of(const Source& s, const Target& to, int64_t first, int64_t rows, int64_t cols,
                    double divisor) {
  const double inverse = 1 / divisor;
  const int64_t step = s.col_stride, out_step = to.col_stride;
  specialized([=] {
    for (int64_t i = first; i < first + rows; ++i) {
      const T* __restrict from = static_cast<const T*>(s.data) + i * s.row_stride;
      T* __restrict out = static_cast<T*>(to.data) + i * to.row_stride;
      if (step == 1 && out_step == 1) {
        for (int64_t j = 0; j < cols; ++j) quotient(from[j], divisor, inverse, out[j]);
      } else {
        for (int64_t j = 0; j < cols; ++j) {
          quotient(from[j * step], divisor, inverse, out[j * out_step]);
        }
      }
    }
  });
}

// Rows [first, first + rows) of `s`, whatever its exponent, over `divisor`.
inline void divide_rows(const Source& s, const Target& to, int64_t first, int64_t rows,
                        int64_t cols, double divisor) {
  with_element(s.element,
               [&]<class T>(const T*) { divide_rows_of<T>(s, to, first, rows, cols, divisor); });
}

}  // namespace orthonorm::power
