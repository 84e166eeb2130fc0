// Elements, lanes and operands of the packed products in gemm.h; torch-free.
//
// An element is what a tensor stores; a lane is what a packed panel holds and a product consumes:
// the float or double itself, a 16-bit element widened to float, or a pair of bfloat16 neighbours
// along the depth for the processor's pairwise dot product, on vectors (Pair) or tiles (TilePair).
#pragma once

#include <cstdint>
#include <type_traits>

#include "elements.h"

namespace orthonorm::gemm {

struct Pair {
  uint32_t bits;  // element 2k in the low half, 2k + 1 in the high half
};

// A pair in panels for AMX, as deep as whole tiles: see gemm_amx.h.
struct TilePair {
  uint32_t bits;
};
inline constexpr int64_t TILE = 16;  // lines of a tile, and lanes of a line

template <class Lane>
inline constexpr bool on_tiles = std::is_same_v<Lane, TilePair>;
template <class Lane>
inline constexpr bool paired = std::is_same_v<Lane, Pair> || on_tiles<Lane>;

// What products of a lane are summed in.
template <class Lane>
using Sum = std::conditional_t<std::is_same_v<Lane, double>, double, float>;

// One iteration of a polynomial: a I + b R + c R^2.
struct Triple {
  double a, b, c;
};

// One operand: element (i, j) of matrix b at data[b batch + i row + j col].
template <class T>
struct Strided {
  T* data = nullptr;
  int64_t row = 0, col = 0, batch = 0;

  T* at(int64_t i, int64_t j) const { return data + i * row + j * col; }
  Strided transposed() const { return {data, col, row, batch}; }
  Strided matrix(int64_t b) const { return {data == nullptr ? data : data + b * batch, row, col}; }
};

// D = alpha L R + beta E for L rows x depth, R depth x cols, E and D rows x cols, in every matrix
// of a batch.
//
// T is the dtype of L and R, O of E and D. No E: its data is null. D may be E (each element is read
// before it is written) but must not overlap L or R.
template <class T, class O = T>
struct Product {
  int64_t batch = 1, rows = 0, cols = 0, depth = 0;
  Strided<const T> L, R;
  Strided<const O> E;
  Strided<O> D;
  double alpha = 1.0, beta = 0.0;
  bool symmetric = false;  // square: only blocks on and below the diagonal, then mirrored
  bool gram = false;       // R is L transposed, and is not read

  Product matrix(int64_t b) const {
    Product one = *this;
    one.batch = 1;
    one.L = L.matrix(b), one.R = R.matrix(b), one.E = E.matrix(b), one.D = D.matrix(b);
    return one;
  }
};

}  // namespace orthonorm::gemm
