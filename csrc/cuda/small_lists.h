// Lists of small matrices for kernels that give each a block or a cluster of blocks: tables, and
// the way in and out of shared memory.
#pragma once

#include "small_products.h"
#include "sums.h"
#include "table.h"

namespace orthonorm::cuda {

// A batch of wide matrices and their results; tall ones lie by columns. Strides in elements: from
// matrix to matrix, down a column, along a row.
struct SmallEntry {
  char *x, *out;
  int64_t x_stride[3], out_stride[3];
  int32_t rows, columns;
  uint32_t first_block;  // matrices of the table before
  int32_t place;         // matrices of the list before
  Element type;
};

struct SmallTable {
  static constexpr int most_entries = (16384 - 16) / static_cast<int>(sizeof(SmallEntry));
  int32_t entries_used = 0;
  uint32_t matrices = 0;
  int32_t columns = 0;  // of the widest
  SmallEntry entries[most_entries];
};

// a, b, c of every iteration, with the launch like the table.
struct SmallPolynomial {
  static constexpr int most = 128;
  int32_t iterations = 0;
  float coefficients[3 * most];

  SmallPolynomial(const char* op, const std::vector<double>& all)
      : iterations(static_cast<int32_t>(all.size() / 3)) {
    if (all.size() % 3 != 0 || all.size() > 3 * most) {
      std::ostringstream text;
      text << op << ": coefficients must be (a, b, c) of at most " << most << " iterations, got "
           << all.size() << " numbers";
      throw std::length_error(text.str());
    }
    for (size_t i = 0; i < all.size(); ++i) coefficients[i] = static_cast<float>(all[i]);
  }
};

// One matrix in memory, read and written along its consecutive numbers.
struct SmallView {
  char* data;
  Element type;
  int64_t next, step;  // from line to line, along a line
  int lines, length;
  bool by_rows, wide;  // wide: 16 bytes an access

  __device__ SmallView(char* of, const int64_t (&stride)[3], int64_t b, const SmallEntry& e)
      : data(of + b * stride[0] * size_of(e.type)), type(e.type) {
    by_rows = stride[2] == 1 || stride[1] != 1;
    next = stride[by_rows ? 1 : 2], step = stride[by_rows ? 2 : 1];
    lines = by_rows ? e.rows : e.columns, length = by_rows ? e.columns : e.rows;
    const int64_t pitch = lines == 1 ? 0 : next * size_of(type);
    wide = step == 1 && pitch % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  // Of the rows from `first` on, at most `count`; `first` a multiple of eight.
  __device__ SmallView rows(int first, int count) const {
    SmallView part = *this;
    const int left = (by_rows ? lines : length) - first, kept = left < 0 ? 0 : left;
    const int rows = kept < count ? kept : count;
    part.lines = by_rows ? rows : lines, part.length = by_rows ? length : rows;
    part.data = by_rows ? address(first, 0) : address(0, first);
    return part;
  }

  __device__ char* address(int line, int at) const {
    return data + (line * next + at * step) * size_of(type);
  }

  // f(line, at) for runs of eight. Neighbours in a warp have runs of one line, or where that would
  // scatter them over rows of one bank in shared memory, one run of several lines.
  template <int threads, class F>
  __device__ void each_run(const F& f) const {
    const int runs = (length + 7) / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < lines * runs; i += threads) {
      by_rows ? f(i / runs, i % runs * 8) : f(i % lines, i / lines * 8);
    }
  }

  // Numbers beyond the line are 0.
  __device__ void load(int line, int at, float (&x)[8]) const {
    if (wide && at + 8 <= length) {
      Eight<float> raw;
      raw.load(address(line, at), type, 0, 4);
      return raw.get(type, x);
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      x[k] = at + k < length ? cuda::load<float>(address(line, at + k), type) : 0.0f;
    }
  }

  __device__ void store(int line, int at, const float (&x)[8]) const {
    if (wide && at + 8 <= length) {
      Eight<float> raw;
      raw.put(type, x);
      return raw.store(address(line, at), type, 0, 4);
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (at + k < length) cuda::store(address(line, at + k), type, x[k]);
    }
  }
};

// All numbers of a square or wide matrix in shared memory zero.
template <class S, class T>
__device__ inline void clear(T* X, int ld) {
  uint4* const runs = reinterpret_cast<uint4*>(X);
  for (int i = threadIdx.x; i < S::side * ld / 8; i += S::threads) runs[i] = {0, 0, 0, 0};
  __syncthreads();
}

// X = factor x, rounded to float and then to T.
template <class S, class T>
__device__ inline void fetch(T* X, int ld, const SmallView& x, double factor) {
  x.each_run<S::threads>([&](int line, int at) {
    float values[8];
    x.load(line, at, values);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const T value = rounded<T>(static_cast<float>(values[k] * factor));
      if (at + k < x.length) X[x.by_rows ? line * ld + at + k : (at + k) * ld + line] = value;
    }
  });
  __syncthreads();
}

template <class S, class T>
__device__ inline void deliver(const T* X, int ld, const SmallView& out) {
  out.each_run<S::threads>([&](int line, int at) {
    float values[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int inside = at + k < out.length ? at + k : at;
      values[k] = widened(X[out.by_rows ? line * ld + inside : inside * ld + line]);
    }
    out.store(line, at, values);
  });
}

// ---- host --------------------------------------------------------------------------------------

// Cuts a list into tables by the rows there must be room for, 16 to 512, and hands each full one to
// `launch(table, size)`: room for 16 << size.
class SmallLists {
 public:
  static constexpr int sizes = 6, most_side = 128;  // of a block
  static constexpr int most_of_cluster = 16 << (sizes - 1);
  using Launch = std::function<void(const SmallTable&, int size)>;

  explicit SmallLists(Launch launch) : launch_(std::move(launch)) {}

  // A (batch of) matrices with a side that there is room for; results are contiguous.
  void add(const Strided& x, char* out) {
    const int64_t count = matrices(x), down = x.dim - 2, along = x.dim - 1;
    const bool tall = x.sizes[down] > x.sizes[along];
    SmallEntry e{};
    e.x = x.data, e.out = out, e.type = x.type;
    e.rows = static_cast<int32_t>(x.sizes[tall ? along : down]);
    e.columns = static_cast<int32_t>(x.sizes[tall ? down : along]);
    e.x_stride[1] = x.strides[tall ? along : down];
    e.x_stride[2] = x.strides[tall ? down : along];
    e.out_stride[0] = x.sizes[down] * x.sizes[along];
    e.out_stride[1] = tall ? 1 : x.sizes[along];
    e.out_stride[2] = tall ? x.sizes[along] : 1;
    e.place = static_cast<int32_t>(place_);
    place_ += count;
    if (place_ > INT32_MAX) throw std::length_error("more matrices than a launch can count");
    if (numel(x) == 0) return;
    const auto batch = dims_of<1>({x}, 0, down, false);
    unfold(e, batch.data(), batch.data() + batch.size());
  }

  void finish() {
    for (int size = 0; size < sizes; ++size) flush(size);
  }

 private:
  // An entry for every index of the batch dimensions but the last.
  void unfold(SmallEntry e, const Dim<1>* begin, const Dim<1>* end) {
    if (begin == end) return push(e, 1);
    e.x_stride[0] = begin->stride[0];
    if (end - begin == 1) return push(e, begin->size);
    int64_t each = 1;
    for (const Dim<1>* d = begin + 1; d != end; ++d) each *= d->size;
    for (int64_t i = 0; i < begin->size; ++i) {
      unfold(e, begin + 1, end);
      e.x += begin->stride[0] * size_of(e.type);
      e.out += each * e.out_stride[0] * size_of(e.type);
      e.place += static_cast<int32_t>(each);
    }
  }

  void push(const SmallEntry& e, int64_t count) {
    int size = 0;
    while (16 << size < e.rows) ++size;
    auto& slot = tables_[size];
    if (!slot) slot = std::make_unique<SmallTable>();
    if (slot->entries_used == SmallTable::most_entries || slot->matrices + count > INT32_MAX) {
      flush(size);
    }
    SmallEntry& to = slot->entries[slot->entries_used++];
    to = e;
    to.first_block = slot->matrices;
    slot->matrices += static_cast<uint32_t>(count);
    slot->columns = std::max(slot->columns, e.columns);
  }

  void flush(int size) {
    auto& table = tables_[size];
    if (!table || table->entries_used == 0) return;
    launch_(*table, size);
    *table = SmallTable();
  }

  const Launch launch_;
  std::unique_ptr<SmallTable> tables_[sizes];
  int64_t place_ = 0;
};

// body.template operator()<Small<...>>() for a table's size.
template <class T, class Body>
void with_size(int size, const Body& body) {
  switch (size) {
    case 0: return body.template operator()<Small<T, 1, 1>>();
    case 1: return body.template operator()<Small<T, 1, 2>>();
    case 2: return body.template operator()<Small<T, 4, 1>>();
    default: return body.template operator()<Small<T, 4, 2>>();
  }
}

}  // namespace orthonorm::cuda
