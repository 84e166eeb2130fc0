// The parts of a packed product that know its register blocks: panels, strips, mirror images;
// torch-free.
#pragma once

#include "gemm_amx.h"
#include "gemm_crew.h"
#include "gemm_tiles.h"

#include <vector>

namespace orthonorm::gemm {

// Measured 2026-11 with AVX-512 at 768x768 to 2048x2048, on a thread that reaches 249 (float) or
// 498 (bfloat16) GFLOP/s in registers: 200 and 400. All of R packed at once, not in slabs: 150 and
// 360.
//
// A block takes the depth this many lanes at a time: 768 KB of L are reused for its panels of R. On
// tiles a panel of each is in the first cache: 64 and 128 lanes do as well, 256 take up to a quarter
// longer (2 threads of a Xeon with AMX, 2026-11).
template <class Lane>
inline constexpr int64_t DEEP = on_tiles<Lane> ? 64 : 1024;

// Runs body() compiled for instruction set I.
template <Isa I, class Body>
inline void on(const Body& body) {
#if ORTHONORM_X86
  if constexpr (I >= Isa::avx512) return run_avx512(body);
  if constexpr (I == Isa::avx2) return run_avx2(body);
#endif
  body();
}

// Register blocks that leave room for one row of columns and a broadcast: 24 sums of 32 registers
// with AVX-512, 12 of 16 with AVX2, 8 of 16 without.
template <Isa I>
struct Blocks {
  static constexpr int BYTES = I >= Isa::avx512 ? 64 : I == Isa::avx2 ? 32 : 16;
  static constexpr int VECTORS = I == Isa::avx2 ? 3 : 2;
  static constexpr int QUADS = I >= Isa::avx512 ? 3 : 1;
};

struct Block {
  int64_t row, col, rows, cols;
};

template <Isa I, class Lane>
struct Strips {
  using S = Sum<Lane>;
  using B = Blocks<I>;
  static constexpr int BYTES = B::BYTES, W = BYTES / sizeof(S), WIDTH = B::VECTORS * W;
  // Rows of a strip: whole tiles and whole square blocks.
  static constexpr int HEIGHT = on_tiles<Lane> ? SQUARE : 48;
  // Of a block: whole strips and whole panels. Tiles ask more of the caches than vectors: 192
  // instead of 384 takes two to ten percent longer.
  static constexpr int SIDE = on_tiles<Lane> ? 384 : 192;
  static constexpr int64_t STEP = per_lane<Lane>();
  static_assert(on_tiles<Lane> || HEIGHT % (4 * B::QUADS) == 0);
  static_assert(HEIGHT % W == 0 && WIDTH % 4 == 0);
  static_assert(SIDE / 2 % HEIGHT == 0 && SIDE / 2 % WIDTH == 0 && HEIGHT >= WIDTH);

  static int64_t panels(int64_t count) { return (count + WIDTH - 1) / WIDTH; }
  static int64_t blocks(int64_t count) { return (count + SIDE - 1) / SIDE; }

  // A result of `rows` rows and columns [first, end) in square blocks, smaller ones where that is
  // needed to keep all threads busy. In a symmetric result blocks on the diagonal, which are
  // cheaper, come last.
  static std::vector<Block> divide(int64_t rows, int64_t first, int64_t end, bool symmetric,
                                   int64_t threads) {
    const int64_t large = blocks(rows) * blocks(end - first) / (symmetric ? 2 : 1);
    const int64_t side = threads > 1 && large < 8 * threads ? SIDE / 2 : SIDE;
    std::vector<Block> plan, diagonal;
    for (int64_t col = first; col < end; col += side) {
      for (int64_t row = symmetric ? col : 0; row < rows; row += side) {
        const Block block{row, col, std::min(side, rows - row), std::min(side, end - col)};
        (symmetric && row == col ? diagonal : plan).push_back(block);
      }
    }
    plan.insert(plan.end(), diagonal.begin(), diagonal.end());
    return plan;
  }

  // GROUP neighbouring panels of `count` rows of `from`, elements [begin, begin + depth), whose
  // lanes begin at `to`, `stride` lanes a panel. Where memory runs across the panels they take
  // turns every few rows, so that a row is read in one go.
  static constexpr int64_t GROUP = 4;
  template <class T>
  static void pack_group(Strided<const T> from, int64_t count, int64_t group, int64_t begin,
                         int64_t depth, Lane* to, int64_t stride, bool left = false) {
    const int64_t turn = from.row == 1 ? 16 * STEP : std::max<int64_t>(depth, 1);
    const int64_t last = std::min(group + GROUP, panels(count));
    for (int64_t k = begin; k == begin || k < begin + depth; k += turn) {
      for (int64_t panel = group; panel < last; ++panel) {
        const T* start = from.at(panel * WIDTH, k);
        const int64_t valid = std::min<int64_t>(count - panel * WIDTH, WIDTH);
        const int64_t deep = std::min(turn, begin + depth - k);
        Lane* lanes = to + (panel * stride + k / STEP) * WIDTH;
        on<I>([&] {
          if constexpr (on_tiles<Lane>) {
            if (left) return pack_left_tiles<BYTES>(start, from.row, from.col, valid, deep, lanes);
          }
          pack_panel<T, Lane, WIDTH, BYTES>(start, from.row, from.col, valid, deep, lanes);
        });
      }
    }
  }

  // sums (+)= rows [row, row + rows) of `left`, `stride` lanes a panel, times `cols` columns of
  // `panel`, over `chunk` lanes from k on.
  static void multiply_strip(const Lane* left, int64_t stride, int64_t row, int64_t rows,
                             int64_t cols, const Lane* panel, int64_t k, int64_t chunk, bool more,
                             S* sums, [[maybe_unused]] const Ahead& ahead = {}) {
    if (!more && (rows < HEIGHT || cols < WIDTH)) std::memset(sums, 0, sizeof(S) * HEIGHT * WIDTH);
    if constexpr (on_tiles<Lane>) {
      return multiply_tiles(left + row * stride + k * WIDTH, panel, rows, cols, chunk, more, sums,
                            ahead);
    } else {
      for (int64_t r = 0; r < rows; r += 4 * B::QUADS) {
        const Lane* quads[B::QUADS];
        const int64_t count = std::min<int64_t>(B::QUADS, (rows - r + 3) / 4);
        for (int64_t q = 0; q < count; ++q) {
          const int64_t at = row + r + 4 * q;
          quads[q] = left + (at / WIDTH * stride + k) * WIDTH + at % WIDTH;
        }
        S* out = sums + r * WIDTH;
        choose_tile<B::QUADS, B::VECTORS>(count, cols, quads, panel, chunk, more, out);
      }
    }
  }

  // The smallest tile that covers `count` quads and `cols` columns.
  template <int QUADS, int VECTORS>
  static void choose_tile(int64_t count, int64_t cols, const Lane* const* quads, const Lane* panel,
                          int64_t depth, bool more, S* out) {
    if constexpr (QUADS > 1) {
      if (count < QUADS) {
        return choose_tile<QUADS - 1, VECTORS>(count, cols, quads, panel, depth, more, out);
      }
    }
    if constexpr (VECTORS > 1) {
      if (cols <= (VECTORS - 1) * W) {
        return choose_tile<QUADS, VECTORS - 1>(count, cols, quads, panel, depth, more, out);
      }
    }
#if ORTHONORM_X86
    if constexpr (std::is_same_v<Lane, Pair>) {
      return tile_pairs<WIDTH, QUADS, VECTORS>(quads, panel, depth, more, out);
    } else
#endif
    on<I>([&] { tile<Lane, BYTES, WIDTH, QUADS, VECTORS>(quads, panel, depth, more, out); });
  }

  // One block of L R, both packed whole, `lanes` lanes a panel: done(row, col, rows, cols, sums)
  // for every strip, of a symmetric result on and below the diagonal. `sums` is room for a block.
  template <class Done>
  static void multiply_block(const Block& block, const Lane* left, const Lane* right, int64_t lanes,
                             int64_t all_cols, bool symmetric, S* sums, const Done& done) {
    const int64_t end = block.row + block.rows;
    [[maybe_unused]] const TilesOf<Lane> tiles;
    for (int64_t k = 0; k < lanes; k += DEEP<Lane>) {
      const int64_t chunk = std::min(DEEP<Lane>, lanes - k);
      S* strip = sums;
      for (int64_t col = block.col; col < block.col + block.cols; col += WIDTH) {
        const Lane* panel = right + (col * lanes + k * WIDTH);
        const int64_t cols = std::min<int64_t>(WIDTH, all_cols - col);
        for (int64_t row = symmetric ? std::max(block.row, col) : block.row; row < end;
             row += HEIGHT) {
          const int64_t rows = std::min<int64_t>(HEIGHT, end - row);
          Ahead ahead;
          if constexpr (on_tiles<Lane>) {
            ahead = next_chunk(block, row, col, left, right, lanes, k + chunk);
          }
          multiply_strip(left, lanes, row, rows, cols, panel, k, chunk, k > 0, strip, ahead);
          if (k + chunk == lanes) on<I>([&] { done(row, col, rows, cols, strip); });
          strip += HEIGHT * WIDTH;
        }
      }
    }
  }

  // A strip's share of the operands of its block from lane k on.
  static Ahead next_chunk(const Block& block, int64_t row, int64_t col, const Lane* left,
                          const Lane* right, int64_t lanes, int64_t k) {
    const int64_t deep = std::min(DEEP<Lane>, lanes - k) * WIDTH;  // lanes of a panel
    const int64_t parts = std::min(panels(block.rows), panels(block.cols));
    const int64_t lines = deep / TILE / parts;
    const auto share = [&](const Lane* panel, int64_t part) {
      return part < parts ? panel + k * WIDTH + part * lines * TILE : nullptr;
    };
    return {share(left + row * lanes, (col - block.col) / WIDTH),
            share(right + col * lanes, (row - block.row) / WIDTH), lines};
  }

  // The square of a strip that lies on the diagonal: its lower triangle counts.
  ORTHONORM_INLINE static void mirror(S* sums) {
    for (int i = 0; i < WIDTH; ++i) {
      for (int j = i + 1; j < WIDTH; ++j) sums[i * WIDTH + j] = sums[j * WIDTH + i];
    }
  }

  // A strip to memory, turned where its columns lie next to each other there.
  template <class O>
  ORTHONORM_INLINE static void store_strip(const S* sums, int64_t rows, int64_t cols,
                                           Strided<O> D) {
    if (D.row == 1 && D.col != 1) return store_turned(sums, rows, cols, D.transposed());
    store<S, O, WIDTH>(sums, rows, cols, D);
  }

  // The transpose of a strip.
  template <class O>
  ORTHONORM_INLINE static void store_turned(const S* sums, int64_t rows, int64_t cols,
                                            Strided<O> D) {
    alignas(64) S turned[WIDTH * HEIGHT];
    turn<S, HEIGHT, WIDTH, BYTES>(sums, turned);
    store<S, O, HEIGHT>(turned, cols, rows, D);
  }
};

}  // namespace orthonorm::gemm
