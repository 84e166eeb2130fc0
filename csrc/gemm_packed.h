// Matrices that stay packed from product to product; torch-free.
//
// Panels of a matrix's columns hold its strips as they are, panels of its rows hold them turned. A
// symmetric matrix has the same panels either way, so one copy of it is both operands.
#pragma once

#include "gemm_strips.h"

namespace orthonorm::gemm {

// A matrix as the left operand of a product and as the right one of a product with its transpose.
template <class Lane>
struct Operand {
  Lane *left, *right;  // the same but on tiles
};

// Stored as T: what is put is rounded to it, and what is got was.
template <Isa I, class T, class Lane>
struct Packed {
  using F = Strips<I, Lane>;
  using S = typename F::S;
  static constexpr int WIDTH = F::WIDTH, HEIGHT = F::HEIGHT;
  static constexpr int64_t STEP = F::STEP;

  // Lanes of `count` rows or columns over a depth.
  static int64_t size(int64_t count, int64_t depth) {
    return F::panels(count) * WIDTH * lanes_of<Lane>(depth);
  }

  // Room for an operand of `count` rows.
  static int64_t bytes(int64_t count, int64_t depth) {
    return (on_tiles<Lane> ? 2 : 1) * Workspace::bytes_for<Lane>(size(count, depth));
  }
  static Operand<Lane> take(Workspace& memory, int64_t count, int64_t depth) {
    Lane* left = memory.template take<Lane>(size(count, depth));
    return {left, on_tiles<Lane> ? memory.template take<Lane>(size(count, depth)) : left};
  }

  // Zeros beyond the matrix, as in what is packed from memory. Strips on tiles bring their own.
  static void clear_edge(Lane* to, int64_t count, int64_t depth) {
    if (on_tiles<Lane>) return;
    const int64_t all = size(count, depth), panel = WIDTH * lanes_of<Lane>(depth);
    std::fill(to + all - panel, to + all, Lane{});
  }

  ORTHONORM_INLINE static Lane lane(S first, S second) {
    T low;
    narrow(first, low);
    if constexpr (STEP == 2) {
      T high;
      narrow(second, high);
      return {low.bits | static_cast<uint32_t>(high.bits) << 16};
    } else {
      return widen(low);
    }
  }

  // Where element (k, j) of the panels is: of column j and row k, or of row j and column k.
  static int64_t at(int64_t k, int64_t j, int64_t lanes) {
    return (j / WIDTH * lanes + k / STEP) * WIDTH + j % WIDTH;
  }

  // The strip at (row, col) into panels of columns.
  ORTHONORM_INLINE static void put(const S* sums, int64_t row, int64_t col, int64_t rows,
                                   [[maybe_unused]] int64_t cols, int64_t lanes, Lane* to) {
    to += at(row, col, lanes);
    if constexpr (on_tiles<Lane>) {
      alignas(64) Lane block[BLOCK];
      round_rows(sums, rows, cols, block);
      pair_rows(block, to);
    } else if constexpr (STEP == 2) {
      int64_t r = 0;
      for (; r + 2 <= rows; r += 2) {
        for (int c = 0; c < WIDTH; ++c) {
          to[r / 2 * WIDTH + c] = lane(sums[r * WIDTH + c], sums[(r + 1) * WIDTH + c]);
        }
      }
      if (r == rows) return;
      for (int c = 0; c < WIDTH; ++c) to[r / 2 * WIDTH + c] = lane(sums[r * WIDTH + c], S(0));
    } else {
      for (int64_t i = 0; i < rows * WIDTH; ++i) to[i] = lane(sums[i], S(0));
    }
  }

  // The same into panels of rows.
  ORTHONORM_INLINE static void put_rows(const S* sums, int64_t row, int64_t col, int64_t rows,
                                        int64_t cols, int64_t lanes, const Operand<Lane>& to) {
    if constexpr (on_tiles<Lane>) {
      Lane* block = to.left + at(col, row, lanes);
      round_rows(sums, rows, cols, block);
      turn_rows(block, to.right + at(col, row, lanes));
    } else {
      put_turned(sums, row, col, rows, cols, lanes, to.left);
    }
  }

  // A strip of a symmetric result and its mirror image.
  ORTHONORM_INLINE static void put_symmetric(S* sums, int64_t row, int64_t col, int64_t rows,
                                             int64_t cols, int64_t lanes,
                                             const Operand<Lane>& to) {
    if (row == col) F::mirror(sums);
    if constexpr (on_tiles<Lane>) {
      const int64_t here = at(row, col, lanes), there = at(col, row, lanes);
      round_rows(sums, rows, cols, to.left + there);
      pair_rows(to.left + there, to.right + here);
      if (row == col) return;
      turn_pairs(to.right + here, to.left + here);
      turn_rows(to.left + there, to.right + there);
    } else {
      put(sums, row, col, rows, cols, lanes, to.left);
      put_turned(sums, row, col, rows, cols, lanes, to.left);
    }
  }

  // The strip, turned, into panels of columns of the transpose.
  ORTHONORM_INLINE static void put_turned(const S* sums, int64_t row, int64_t col, int64_t rows,
                                          int64_t cols, int64_t lanes, Lane* to) {
    alignas(64) S turned[(WIDTH + 1) * HEIGHT];
    turn<S, HEIGHT, WIDTH, F::BYTES>(sums, turned);
    if (STEP == 2 && cols % 2 != 0) std::fill_n(turned + cols * HEIGHT, HEIGHT, S(0));
    for (int64_t r = 0; r < rows;) {
      const int64_t within = (row + r) % WIDTH, count = std::min<int64_t>(WIDTH - within, rows - r);
      Lane* panel = to + at(col, row + r, lanes);
      for (int64_t c = 0; c < cols; c += STEP) {
        const S *first = turned + c * HEIGHT + r, *second = first + (STEP - 1) * HEIGHT;
        Lane* line = panel + c / STEP * WIDTH;
        for (int64_t i = 0; i < count; ++i) line[i] = lane(first[i], second[i]);
      }
      r += count;
    }
  }

  // sums <- alpha sums + beta E, the strip of E at (row, col) from panels of columns.
  ORTHONORM_INLINE static void combine(S* sums, S alpha, S beta, const Lane* E, int64_t row,
                                       int64_t col, int64_t rows, int64_t lanes) {
    E += at(row, col, lanes);
    if constexpr (STEP == 2) {
      for (int64_t r = 0; r < rows; r += 2) {
        for (int c = 0; c < WIDTH; ++c) {
          const uint32_t pair = E[r / 2 * WIDTH + c].bits;
          S &low = sums[r * WIDTH + c], &high = sums[(r + 1) * WIDTH + c];
          low = alpha * low + beta * widen(Bf16{static_cast<uint16_t>(pair)});
          high = alpha * high + beta * widen(Bf16{static_cast<uint16_t>(pair >> 16)});
        }
      }
    } else {
      for (int64_t i = 0; i < rows * WIDTH; ++i) sums[i] = alpha * sums[i] + beta * E[i];
    }
  }
};

// f(engine, b, crew) for every matrix b of a batch: whole matrices side by side, each thread with
// an Engine for itself, or one after the other with an Engine for all threads. make(slots) makes
// one.
template <class Make, class F>
void for_batch(int64_t batch, double work, int64_t threads, const Parallel& parallel,
               const Make& make, const F& f) {
  if (work * static_cast<double>(batch) < SERIAL_WORK) threads = 1;
  const Crew crew{threads, parallel}, alone{1, parallel};
  if (!whole(batch, threads, work)) {
    const auto engine = make(threads);
    for (int64_t b = 0; b < batch; ++b) f(*engine, b, crew);
    return;
  }
  std::vector<decltype(make(1))> engines(static_cast<size_t>(std::max<int64_t>(threads, 1)));
  for (auto& engine : engines) engine = make(1);
  crew.each(batch, [&](int64_t slot, int64_t b) { f(*engines[slot], b, alone); });
}

}  // namespace orthonorm::gemm
