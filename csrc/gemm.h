// Packed, register-blocked products D = alpha L R + beta E on any instruction set; torch-free.
//
//   multiply(product, threads, parallel, isa): parallel(n, f) runs f(begin, end) over [0, n)
//
// L and R are packed, R in slabs of columns; then square blocks of the result are handed out. Every
// sum is formed by one thread in an order that depends on the depth alone, so results do not depend
// on the number of threads or on the batch around a matrix.
#pragma once

#include "gemm_crew.h"
#include "gemm_tiles.h"

#include <memory>
#include <vector>

namespace orthonorm::gemm {

// Measured 2026-11 with AVX-512 at 768x768 to 2048x2048, on a thread that reaches 249 (float) or 498
// (bfloat16) GFLOP/s in registers: 200 and 400. All of R packed at once, not in slabs: 150 and 360.
//
// A block takes the depth this many lanes at a time: 768 KB of L are reused for its panels of R.
inline constexpr int64_t DEEP = 1024;
// Deeper products are summed slab by slab, or packed rows would leave the caches before their use.
inline constexpr int64_t SLAB = 2048;
// What is packed of R at a time, for each thread.
inline constexpr int64_t RIGHT_BYTES = 1 << 20;
// Below this many operations one thread is done before others have started.
inline constexpr double SERIAL_WORK = 2e6;
// Matrices of a batch below this are spread over the threads whole.
inline constexpr double WHOLE_WORK = 2e7;

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

template <Isa I, class T, class O, class Lane>
class Engine {
  using S = Sum<Lane>;
  using B = Blocks<I>;
  static constexpr int BYTES = B::BYTES, W = BYTES / sizeof(S), WIDTH = B::VECTORS * W;
  static constexpr int HEIGHT = 48;  // rows of a strip: whole tiles and whole square blocks
  static constexpr int SIDE = 192;   // of a block: whole strips and whole panels
  static constexpr int64_t STEP = per_lane<Lane>();
  static_assert(HEIGHT % (4 * B::QUADS) == 0 && HEIGHT % W == 0 && WIDTH % 4 == 0);
  static_assert(SIDE / 2 % HEIGHT == 0 && SIDE / 2 % WIDTH == 0 && HEIGHT >= WIDTH);
  struct Block {
    int64_t row, col, rows, cols;
  };

 public:
  // Memory for products of the size of `p` on up to `slots` threads.
  Engine(const Product<T, O>& p, int64_t slots)
      : p_(p),
        depth_(std::clamp<int64_t>(p.depth, 1, SLAB * STEP)),
        lanes_(lanes_of<Lane>(depth_)),
        width_(p.gram ? p.cols : std::min(p.cols, slab_width(slots))),
        left_size_(panels(p.rows) * WIDTH * lanes_),
        right_size_(p.gram ? 0 : panels(width_) * WIDTH * lanes_),
        kept_size_(p.depth > depth_ ? blocks(p.rows) * blocks(width_) * SIDE * SIDE : 0),
        memory_(Workspace::bytes_for<Lane>(left_size_) + Workspace::bytes_for<Lane>(right_size_) +
                Workspace::bytes_for<S>(kept_size_) +
                Workspace::bytes_for<S>(slots * block_size())) {
    left_ = memory_.template take<Lane>(left_size_);
    right_ = p.gram ? left_ : memory_.template take<Lane>(right_size_);
    kept_ = memory_.template take<S>(kept_size_);
    sums_ = memory_.template take<S>(slots * block_size());
  }

  // One matrix with all threads.
  void run(const Product<T, O>& p, const Crew& crew) {
    p_ = p;
    for (first_col_ = 0; first_col_ < p.cols; first_col_ += width_) {
      end_col_ = std::min(first_col_ + width_, p.cols);
      if (plan_.empty() || width_ < p.cols) plan_ = divide(crew.threads);
      for (from_ = 0; from_ == 0 || from_ < p.depth; from_ += depth_) {
        now_ = std::min(depth_, p.depth - from_);
        pack(crew);
        crew.each(static_cast<int64_t>(plan_.size()), [&](int64_t slot, int64_t index) {
          compute(plan_[index], sums_ + slot * block_size());
        });
      }
    }
  }

 private:
  static int64_t panels(int64_t count) { return (count + WIDTH - 1) / WIDTH; }
  static int64_t blocks(int64_t count) { return (count + SIDE - 1) / SIDE; }
  // Sums of the largest block in whole strips.
  int64_t block_size() const {
    return std::min<int64_t>(SIDE, (p_.rows + HEIGHT - 1) / HEIGHT * HEIGHT) *
           std::min<int64_t>(SIDE, panels(p_.cols) * WIDTH);
  }
  // Columns of R packed at a time: what was packed is still in the caches when it is used.
  int64_t slab_width(int64_t slots) const {
    const int64_t fit = slots * RIGHT_BYTES / (lanes_ * static_cast<int64_t>(sizeof(Lane)));
    return std::max<int64_t>(fit / SIDE, 1) * SIDE;
  }

  // The result in square blocks, smaller ones where that is needed to keep all threads busy. In a
  // symmetric result blocks on the diagonal, which are cheaper, come last.
  std::vector<Block> divide(int64_t threads) const {
    const int64_t large = blocks(p_.rows) * blocks(end_col_ - first_col_) / (p_.symmetric ? 2 : 1);
    const int64_t side = threads > 1 && large < 8 * threads ? SIDE / 2 : SIDE;
    std::vector<Block> plan, diagonal;
    for (int64_t col = first_col_; col < end_col_; col += side) {
      for (int64_t row = p_.symmetric ? col : 0; row < p_.rows; row += side) {
        const Block block{row, col, std::min(side, p_.rows - row), std::min(side, end_col_ - col)};
        (p_.symmetric && row == col ? diagonal : plan).push_back(block);
      }
    }
    plan.insert(plan.end(), diagonal.begin(), diagonal.end());
    return plan;
  }

  // Rows of L, unless the last slab of columns left them, and columns of R into panels.
  void pack(const Crew& crew) {
    constexpr int64_t part = 1024 * STEP;
    const int64_t parts = std::max<int64_t>(1, (now_ + part - 1) / part);
    const bool again = first_col_ > 0 && now_ == p_.depth;
    const int64_t left = again ? 0 : (panels(p_.rows) + GROUP - 1) / GROUP * parts;
    const int64_t cols = end_col_ - first_col_;
    const int64_t right = p_.gram ? 0 : (panels(cols) + GROUP - 1) / GROUP * parts;
    Strided<const T> R = p_.R.transposed();
    if (!p_.gram) R.data = R.at(first_col_, 0);
    crew.each(left + right, [&](int64_t, int64_t index) {
      const bool is_left = index < left;
      const int64_t group = (is_left ? index : index - left) / parts * GROUP;
      const int64_t begin = (is_left ? index : index - left) % parts * part;
      pack_group(is_left ? p_.L : R, is_left ? p_.rows : cols, group, begin,
                 std::min(part, now_ - begin), is_left ? left_ : right_);
    });
  }

  // GROUP neighbouring panels over [begin, begin + depth). Where memory runs across the panels they
  // take turns every few rows, so that a row is read in one go.
  static constexpr int64_t GROUP = 4;
  void pack_group(Strided<const T> from, int64_t count, int64_t group, int64_t begin,
                  int64_t depth, Lane* to) const {
    const int64_t turn = from.row == 1 ? 16 * STEP : std::max<int64_t>(depth, 1);
    const int64_t last = std::min(group + GROUP, panels(count));
    for (int64_t k = begin; k == begin || k < begin + depth; k += turn) {
      for (int64_t panel = group; panel < last; ++panel) {
        const T* start = from.at(panel * WIDTH, from_ + k);
        const int64_t valid = std::min<int64_t>(count - panel * WIDTH, WIDTH);
        const int64_t deep = std::min(turn, begin + depth - k);
        Lane* lanes = to + (panel * lanes_ + k / STEP) * WIDTH;
        on<I>([&] {
          pack_panel<T, Lane, WIDTH, BYTES>(start, from.row, from.col, valid, deep, lanes);
        });
      }
    }
  }

  // All strips of one block, chunk by chunk; what the last chunk completes is stored.
  void compute(const Block& block, S* sums) {
    const int64_t lanes = lanes_of<Lane>(now_);
    const bool first = from_ == 0, last = from_ + now_ == p_.depth;
    if (!first || !last) {
      const int64_t col = block.col - first_col_, half = SIDE / 2;
      sums = kept_ + (block.row / SIDE * blocks(width_) + col / SIDE) * SIDE * SIDE +
             (block.row % SIDE * SIDE + col % SIDE * half);
    }
    for (int64_t k = 0; k == 0 || k < lanes; k += DEEP) {
      const int64_t chunk = std::min(DEEP, lanes - k);
      S* strip = sums;
      for (int64_t col = block.col; col < block.col + block.cols; col += WIDTH) {
        const Lane* panel = right_ + (col - first_col_) * lanes_ + k * WIDTH;
        const int64_t begin = p_.symmetric ? std::max(block.row, col) : block.row;
        for (int64_t row = begin; row < block.row + block.rows; row += HEIGHT) {
          const int64_t rows = std::min<int64_t>(HEIGHT, block.row + block.rows - row);
          const int64_t cols = std::min<int64_t>(WIDTH, p_.cols - col);
          const bool done = last && k + chunk == lanes;
          if (done) expect(row, col, rows);
          multiply_strip(row, rows, cols, panel, k, chunk, !first || k > 0, strip);
          if (done) on<I>([&] { finish(row, col, rows, cols, strip); });
          strip += HEIGHT * WIDTH;
        }
      }
    }
  }

  // Fetches lines that `finish` will need while their sums are formed: one percent (2026-11).
  void expect(int64_t row, int64_t col, int64_t rows) const {
    for (int64_t r = row; r < row + rows; ++r) {
      if (p_.E.data != nullptr) __builtin_prefetch(p_.E.at(r, col));
      __builtin_prefetch(p_.D.at(r, col), 1);
    }
  }

  void multiply_strip(int64_t row, int64_t rows, int64_t cols, const Lane* panel, int64_t k,
                      int64_t chunk, bool more, S* sums) const {
    if (!more && (rows < HEIGHT || cols < WIDTH)) std::memset(sums, 0, sizeof(S) * HEIGHT * WIDTH);
    for (int64_t r = 0; r < rows; r += 4 * B::QUADS) {
      const Lane* quads[B::QUADS];
      const int64_t count = std::min<int64_t>(B::QUADS, (rows - r + 3) / 4);
      for (int64_t q = 0; q < count; ++q) {
        const int64_t at = row + r + 4 * q;
        quads[q] = left_ + (at / WIDTH * lanes_ + k) * WIDTH + at % WIDTH;
      }
      S* out = sums + r * WIDTH;
      choose_tile<B::QUADS, B::VECTORS>(count, cols, quads, panel, chunk, more, out);
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

  // Scalars, E, rounding, and the mirror image of a strip.
  ORTHONORM_INLINE void finish(int64_t row, int64_t column, int64_t rows, int64_t cols, S* sums) {
    const S alpha = static_cast<S>(p_.alpha), beta = static_cast<S>(p_.beta);
    if (p_.E.data != nullptr) {
      alignas(64) S extra[HEIGHT * WIDTH];
      if (rows < HEIGHT) std::memset(extra, 0, sizeof extra);
      pack_panel<O, S, WIDTH, BYTES>(p_.E.at(row, column), p_.E.col, p_.E.row, cols, rows, extra);
      combine<S, HEIGHT * WIDTH>(sums, alpha, extra, beta);
    } else {
      combine<S, HEIGHT * WIDTH>(sums, alpha, static_cast<const S*>(nullptr), beta);
    }
    if (p_.symmetric) {
      if (row == column) {  // the block on the diagonal: its lower triangle counts
        for (int i = 0; i < WIDTH; ++i) {
          for (int j = i + 1; j < WIDTH; ++j) sums[i * WIDTH + j] = sums[j * WIDTH + i];
        }
      }
      store_turned(sums, rows, cols, {p_.D.at(column, row), p_.D.row, p_.D.col, 0});
    }
    const Strided<O> D{p_.D.at(row, column), p_.D.row, p_.D.col, 0};
    if (D.row == 1 && D.col != 1) return store_turned(sums, rows, cols, D.transposed());
    store<S, O, WIDTH>(sums, rows, cols, D);
  }

  // The transpose of a strip, whose columns then lie next to each other in memory.
  ORTHONORM_INLINE static void store_turned(const S* sums, int64_t rows, int64_t cols,
                                            Strided<O> D) {
    alignas(64) S turned[WIDTH * HEIGHT];
    turn<S, HEIGHT, WIDTH, BYTES>(sums, turned);
    store<S, O, HEIGHT>(turned, cols, rows, D);
  }

  Product<T, O> p_;
  int64_t depth_, lanes_, width_, left_size_, right_size_, kept_size_;
  Workspace memory_;
  Lane *left_ = nullptr, *right_ = nullptr;
  S *kept_ = nullptr, *sums_ = nullptr;
  std::vector<Block> plan_;
  int64_t first_col_ = 0, end_col_ = 0;  // this slab of columns
  int64_t from_ = 0, now_ = 0;           // and of the depth
};

// All matrices of the batch: whole ones side by side when they are small, else one after another.
template <Isa I, class Lane, class T, class O>
void multiply_as(const Product<T, O>& p, int64_t threads, const Parallel& parallel) {
  const double work = static_cast<double>(p.rows) * p.cols * p.depth * (p.symmetric ? 1 : 2);
  if (work * p.batch < SERIAL_WORK) threads = 1;
  const Crew crew{threads, parallel};
  if (p.batch < threads || work > WHOLE_WORK) {
    Engine<I, T, O, Lane> engine(p, threads);
    for (int64_t b = 0; b < p.batch; ++b) engine.run(p.matrix(b), crew);
    return;
  }
  const Crew alone{1, parallel};
  std::vector<std::unique_ptr<Engine<I, T, O, Lane>>> engines(std::max<int64_t>(threads, 1));
  for (auto& engine : engines) engine = std::make_unique<Engine<I, T, O, Lane>>(p, 1);
  crew.each(p.batch, [&](int64_t slot, int64_t b) { engines[slot]->run(p.matrix(b), alone); });
}

template <class T, class O>
void multiply(const Product<T, O>& p, int64_t threads, const Parallel& parallel, Isa chosen) {
  if (p.batch == 0 || p.rows == 0 || p.cols == 0) return;
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
#if ORTHONORM_X86
  if constexpr (std::is_same_v<T, Bf16>) {
    if (chosen == Isa::avx512bf16) {
      return multiply_as<Isa::avx512bf16, Pair>(p, threads, parallel);
    }
  }
  if (chosen >= Isa::avx512) return multiply_as<Isa::avx512, Wide>(p, threads, parallel);
  if (chosen == Isa::avx2) return multiply_as<Isa::avx2, Wide>(p, threads, parallel);
#endif
  multiply_as<Isa::portable, Wide>(p, threads, parallel);
}

}  // namespace orthonorm::gemm
