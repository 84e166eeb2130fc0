// Packed, register-blocked products D = alpha L R + beta E on any instruction set; torch-free.
//
//   multiply(product, threads, parallel, isa): parallel(n, f) runs f(begin, end) over [0, n)
//
// L and R are packed, R in slabs of columns; then square blocks of the result are handed out. Every
// sum is formed by one thread in an order that depends on the depth alone, so results do not depend
// on the number of threads or on the batch around a matrix.
#pragma once

#include "gemm_strips.h"

#include <memory>
#include <vector>

namespace orthonorm::gemm {

// Deeper products are summed slab by slab, or packed rows would leave the caches before their use.
inline constexpr int64_t SLAB = 2048;
// What is packed of R at a time, for each thread.
inline constexpr int64_t RIGHT_BYTES = 1 << 20;
template <Isa I, class T, class O, class Lane>
class Engine {
  using F = Strips<I, Lane>;
  using S = typename F::S;
  static constexpr int BYTES = F::BYTES, WIDTH = F::WIDTH, HEIGHT = F::HEIGHT, SIDE = F::SIDE;
  static constexpr int64_t STEP = F::STEP, GROUP = F::GROUP;

 public:
  // Memory for products of the size of `p` on up to `slots` threads.
  Engine(const Product<T, O>& p, int64_t slots)
      : p_(p),
        depth_(std::clamp<int64_t>(p.depth, 1, SLAB * STEP)),
        lanes_(lanes_of<Lane>(depth_)),
        width_(p.gram ? p.cols : std::min(p.cols, slab_width(slots))),
        left_size_(panels(p.rows) * WIDTH * lanes_),
        right_size_(shared(p) ? 0 : panels(width_) * WIDTH * lanes_),
        kept_size_(p.depth > depth_ ? blocks(p.rows) * blocks(width_) * SIDE * SIDE : 0),
        memory_(Workspace::bytes_for<Lane>(left_size_) + Workspace::bytes_for<Lane>(right_size_) +
                Workspace::bytes_for<S>(kept_size_) +
                Workspace::bytes_for<S>(slots * block_size())) {
    left_ = memory_.template take<Lane>(left_size_);
    right_ = shared(p) ? left_ : memory_.template take<Lane>(right_size_);
    kept_ = memory_.template take<S>(kept_size_);
    sums_ = memory_.template take<S>(slots * block_size());
  }

  // One matrix with all threads.
  void run(const Product<T, O>& p, const Crew& crew) {
    p_ = p;
    for (first_col_ = 0; first_col_ < p.cols; first_col_ += width_) {
      end_col_ = std::min(first_col_ + width_, p.cols);
      if (plan_.empty() || width_ < p.cols) {
        plan_ = F::divide(p.rows, first_col_, end_col_, p.symmetric, crew.threads);
      }
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
  static int64_t panels(int64_t count) { return F::panels(count); }
  static int64_t blocks(int64_t count) { return F::blocks(count); }
  // Whether packed rows are packed columns too.
  static bool shared(const Product<T, O>& p) { return p.gram && !on_tiles<Lane>; }
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

  // Rows of L, unless the last slab of columns left them, and columns of R into panels.
  void pack(const Crew& crew) {
    constexpr int64_t part = 1024 * STEP;
    const int64_t parts = std::max<int64_t>(1, (now_ + part - 1) / part);
    const bool again = first_col_ > 0 && now_ == p_.depth;
    const int64_t left = again ? 0 : (panels(p_.rows) + GROUP - 1) / GROUP * parts;
    const int64_t cols = end_col_ - first_col_;
    const int64_t right = shared(p_) ? 0 : (panels(cols) + GROUP - 1) / GROUP * parts;
    Strided<const T> L = p_.L, R = p_.gram ? p_.L : p_.R.transposed();
    L.data = L.at(0, from_);
    R.data = R.at(first_col_, from_);
    crew.each(left + right, [&](int64_t, int64_t index) {
      const bool is_left = index < left;
      const int64_t group = (is_left ? index : index - left) / parts * GROUP;
      const int64_t begin = (is_left ? index : index - left) % parts * part;
      F::pack_group(is_left ? L : R, is_left ? p_.rows : cols, group, begin,
                    std::min(part, now_ - begin), is_left ? left_ : right_, lanes_, is_left);
    });
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
    [[maybe_unused]] const TilesOf<Lane> tiles;
    for (int64_t k = 0; k == 0 || k < lanes; k += DEEP<Lane>) {
      const int64_t chunk = std::min(DEEP<Lane>, lanes - k);
      S* strip = sums;
      for (int64_t col = block.col; col < block.col + block.cols; col += WIDTH) {
        const Lane* panel = right_ + (col - first_col_) * lanes_ + k * WIDTH;
        const int64_t begin = p_.symmetric ? std::max(block.row, col) : block.row;
        for (int64_t row = begin; row < block.row + block.rows; row += HEIGHT) {
          const int64_t rows = std::min<int64_t>(HEIGHT, block.row + block.rows - row);
          const int64_t cols = std::min<int64_t>(WIDTH, p_.cols - col);
          const bool done = last && k + chunk == lanes;
          if (done) expect(row, col, rows);
          F::multiply_strip(left_, lanes_, row, rows, cols, panel, k, chunk, !first || k > 0,
                            strip);
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
      if (row == column) F::mirror(sums);
      F::template store_turned<O>(sums, rows, cols, {p_.D.at(column, row), p_.D.row, p_.D.col, 0});
    }
    F::template store_strip<O>(sums, rows, cols, {p_.D.at(row, column), p_.D.row, p_.D.col, 0});
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
  if (!whole(p.batch, threads, work)) {
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
#if ORTHONORM_HAS_AMX
    if (chosen == Isa::amx) return multiply_as<Isa::amx, TilePair>(p, threads, parallel);
#endif
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
