// A list of tensors as one parameter of a kernel: which tile belongs to which entry, and where its
// elements lie.
//
// The table travels in the launch itself (constant memory of the kernel, 16 KB of the 32 KB that
// sm_70 and later take): nothing is uploaded before, nothing outlives the launch, and a CUDA graph
// keeps it. A list that does not fit is cut into several launches. Host part and device part; the
// host reads shapes and strides once and finds the fewest dimensions that describe them.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "elements.h"

namespace orthonorm::cuda {

// A tensor as the host sees it; sizes and strides are the tensor's own, in elements.
struct Strided {
  char* data;
  Element type;
  int64_t dim;
  const int64_t *sizes, *strides;
};

inline int64_t numel(const Strided& t) {
  int64_t count = 1;
  for (int64_t d = 0; d < t.dim; ++d) count *= t.sizes[d];
  return count;
}

// Matrices of a batch.
inline int64_t matrices(const Strided& t) {
  int64_t count = 1;
  for (int64_t d = 0; d + 2 < t.dim; ++d) count *= t.sizes[d];
  return count;
}

// A batch of matrices (or a whole tensor as one), an element of which lies in each of N tensors.
template <int N>
struct Entry {
  char* data[N];
  int64_t count;        // elements of a matrix
  int64_t extra;        // what the op wants to know of this item: a number's bits or an address
  int64_t place;        // how far data[0] is from where its tensor begins, in elements
  uint32_t first_tile;  // tiles of all entries before
  uint32_t tiles;       // of a matrix
  int32_t layout;       // in `Table::layouts`; -1: all elements consecutive, matrix after matrix
  int32_t item;         // place in the list
  int32_t first;        // matrices of the list before
  int32_t slot;         // matrices of the table before
  Element type[N <= 4 ? 4 : 8];
};

// Strides in elements; element i of matrix b is b batch + i / columns row + i % columns column.
template <int N>
struct Layout {
  int64_t columns, batch[N], row[N], column[N];
  bool dense;  // rows follow each other
};

template <int N>
struct Table {
  static constexpr int bytes = 16384, most_layouts = 32;
  static constexpr int most_entries =
      (bytes - 16 - most_layouts * static_cast<int>(sizeof(Layout<N>))) /
      static_cast<int>(sizeof(Entry<N>));
  int32_t entries_used = 0, layouts_used = 0;
  int32_t tiles = 0, matrices = 0;
  Entry<N> entries[most_entries];
  Layout<N> layouts[most_layouts];
};
static_assert(sizeof(Table<4>) <= Table<4>::bytes);

// The last entry whose `member` is not after `value`: by tile or by matrix. Empty ones before it
// have the same value, so that it is one with elements.
template <auto member, class Table>
__device__ inline const auto& locate(const Table& table, uint32_t value) {
  int low = 0, high = table.entries_used;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (static_cast<uint32_t>(table.entries[middle].*member) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return table.entries[low];
}

// ---- host --------------------------------------------------------------------------------------

enum class Unit { tensor, matrix };

template <int N>
struct Dim {
  int64_t size;
  std::array<int64_t, N> stride;
};

// Appends a dimension inside the others, as part of the last where all tensors allow it.
template <int N>
void append(std::vector<Dim<N>>& dims, const Dim<N>& d) {
  if (d.size == 1) return;
  bool merges = !dims.empty();
  for (int k = 0; merges && k < N; ++k) {
    merges = dims.back().stride[k] == d.stride[k] * d.size;
  }
  if (!merges) return dims.push_back(d);
  dims.back() = {dims.back().size * d.size, d.stride};
}

// Dimensions [from, to) of N tensors of one shape; `ordered` by memory of the first, else as given.
template <int N>
std::vector<Dim<N>> dims_of(const std::array<Strided, N>& tensors, int64_t from, int64_t to,
                            bool ordered) {
  std::vector<Dim<N>> given, merged;
  for (int64_t d = from; d < to; ++d) {
    Dim<N>& dim = given.emplace_back();
    dim.size = tensors[0].sizes[d];
    for (int k = 0; k < N; ++k) dim.stride[k] = tensors[k].strides[d];
  }
  if (ordered) {
    std::stable_sort(given.begin(), given.end(),
                     [](const Dim<N>& a, const Dim<N>& b) { return a.stride[0] > b.stride[0]; });
  }
  for (const Dim<N>& d : given) append(merged, d);
  return merged;
}

// Cuts lists into tables and hands each full one to `launch(table)`. Entries in double are apart
// from those in float; a table's entries keep the order of the list.
template <int N>
class Lists {
 public:
  using Launch = std::function<void(const Table<N>&, bool wide)>;

  Lists(Unit unit, int64_t tile, Launch launch)
      : unit_(unit), tile_(tile), launch_(std::move(launch)) {}

  void add(const std::array<Strided, N>& tensors, int64_t extra = 0) {
    const Strided& x = tensors[0];
    const int64_t outer = unit_ == Unit::matrix ? x.dim - 2 : 0;
    bool wide = false;
    Entry<N> entry{};
    for (int k = 0; k < N; ++k) {
      entry.data[k] = tensors[k].data;
      entry.type[k] = tensors[k].type;
      wide = wide || tensors[k].type == Element::f64;
    }
    entry.count = product(x.sizes + outer, x.sizes + x.dim);
    entry.extra = extra;
    entry.item = item_++;
    entry.first = static_cast<int32_t>(first_);
    const int64_t matrices = product(x.sizes, x.sizes + outer);
    const bool empty = entry.count == 0 || matrices == 0;
    auto inner = empty ? std::vector<Dim<N>>{} : dims_of<N>(tensors, outer, x.dim, true);
    auto batch = empty ? std::vector<Dim<N>>{} : dims_of<N>(tensors, 0, outer, false);
    if (inner.size() > 2) {  // a tensor of many dimensions: some of them as if they were a batch
      batch.insert(batch.end(), inner.begin(), inner.end() - 2);
      inner.erase(inner.begin(), inner.end() - 2);
      entry.count = inner[0].size * inner[1].size;
    }
    if (empty) {
      push(entry, matrices, nullptr, wide);
    } else {
      unfold(entry, batch.data(), batch.data() + batch.size(), inner, wide);
    }
    first_ += matrices;
  }

  void finish() {
    for (const bool wide : {false, true}) flush(wide);
  }

 private:
  static int64_t product(const int64_t* begin, const int64_t* end) {
    int64_t result = 1;
    for (; begin != end; ++begin) result *= *begin;
    return result;
  }

  // An entry for every index of the batch dimensions but the last.
  void unfold(Entry<N> entry, const Dim<N>* begin, const Dim<N>* end,
              const std::vector<Dim<N>>& inner, bool wide) {
    if (end - begin > 1) {
      int64_t each = 1;
      for (const Dim<N>* d = begin + 1; d != end; ++d) each *= d->size;
      for (int64_t i = 0; i < begin->size; ++i) {
        unfold(entry, begin + 1, end, inner, wide);
        for (int k = 0; k < N; ++k) {
          entry.data[k] += begin->stride[k] * size_of(entry.type[k]);
        }
        entry.place += begin->stride[0];
        entry.first += unit_ == Unit::matrix ? static_cast<int32_t>(each) : 0;
      }
      return;
    }
    const Dim<N> one{1, {}}, &batch = begin == end ? one : *begin;
    const Layout<N> layout = layout_of(batch, inner);
    bool flat = layout.dense;
    for (int k = 0; k < N; ++k) flat = flat && (batch.size == 1 || layout.batch[k] == entry.count);
    push(entry, batch.size, flat ? nullptr : &layout, wide);
  }

  static Layout<N> layout_of(const Dim<N>& batch, const std::vector<Dim<N>>& inner) {
    Layout<N> layout{};
    layout.columns = inner.empty() ? 1 : inner.back().size;
    layout.dense = inner.size() < 2;
    for (int k = 0; k < N; ++k) {
      layout.batch[k] = batch.stride[k];
      layout.row[k] = inner.size() < 2 ? 0 : inner[0].stride[k];
      layout.column[k] = inner.empty() ? 1 : inner.back().stride[k];
      layout.dense = layout.dense && layout.column[k] == 1;
    }
    return layout;
  }

  void push(Entry<N> entry, int64_t matrices, const Layout<N>* layout, bool wide) {
    const int64_t tiles = (entry.count + tile_ - 1) / tile_;
    if (tiles * matrices > INT32_MAX || first_ + matrices > INT32_MAX) {
      std::ostringstream text;
      text << matrices << " matrices of " << entry.count << " elements are more tiles of " << tile_
           << " than a launch can count";
      throw std::length_error(text.str());
    }
    auto& slot = tables_[wide];
    if (!slot) slot = std::make_unique<Table<N>>();
    if (slot->entries_used == Table<N>::most_entries ||
        (layout && slot->layouts_used == Table<N>::most_layouts) ||
        slot->tiles + tiles * matrices > INT32_MAX) {
      flush(wide);
    }
    Table<N>& table = *slot;
    entry.layout = -1;
    if (layout) {
      entry.layout = table.layouts_used++;
      table.layouts[entry.layout] = *layout;
    }
    entry.tiles = static_cast<uint32_t>(tiles);
    entry.first_tile = static_cast<uint32_t>(table.tiles);
    entry.slot = table.matrices;
    table.tiles += static_cast<int32_t>(tiles * matrices);
    table.matrices += static_cast<int32_t>(matrices);
    table.entries[table.entries_used++] = entry;
  }

  void flush(bool wide) {
    auto& table = tables_[wide];
    if (!table || table->entries_used == 0) return;
    launch_(*table, wide);
    *table = Table<N>();
  }

  const Unit unit_;
  const int64_t tile_;
  const Launch launch_;
  std::unique_ptr<Table<N>> tables_[2];
  int64_t first_ = 0;
  int32_t item_ = 0;
};

}  // namespace orthonorm::cuda
