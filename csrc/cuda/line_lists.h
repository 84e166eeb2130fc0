// Lists of matrices whose rows or columns are summed: cut into tables and launched.
#pragma once

#include "lines.h"

namespace orthonorm::cuda {

// A matrix of the list (or a batch of them); what is not there has no data and x's shape.
struct LineItem {
  Strided x, out;
  Strided moments[2];  // of rows, of columns
};

class LineLists {
 public:
  LineLists(const Device& device, const LineRule& rule, bool rows, bool columns)
      : device_(device), rule_(rule), wanted_{rows, columns} {}

  void add(const LineItem& item) {
    const Strided& x = item.x;
    if (numel(x) == 0) return;
    LineEntry e{};
    e.x = x.data;
    e.out = item.out.data;
    e.type = x.type;
    e.out_type = item.out.type;
    // Columns are what is short-strided in memory.
    const int64_t row = x.dim - 2, column = x.dim - 1;
    const bool swap =
        x.sizes[row] > 1 && (x.sizes[column] == 1 || x.strides[row] < x.strides[column]);
    e.mean = swap ? columns_side : rows_side;
    for (int side = 0; side < 2; ++side) {
      const int own = swap ? 1 - side : side;  // which of the item's this is
      const Strided& moments = item.moments[own];
      const int64_t d = own == rows_side ? row : column;
      e.lines[side] = x.sizes[d];
      e.sums[side] = wanted_[own];
      e.x_stride[1 + side] = x.sizes[d] == 1 ? 1 : x.strides[d];
      e.out_stride[1 + side] = item.out.sizes[d] == 1 ? 1 : item.out.strides[d];
      e.moments[side] = moments.data;
      e.moment_type[side] = moments.type;
      e.moment_stride[side][1] = moments.data ? moments.strides[d] : 0;
    }
    const std::array<Strided, 4> all = {item.x, item.out, item.moments[swap], item.moments[!swap]};
    const auto batch = dims_of<4>(all, 0, x.dim - 2, false);
    bool wide = x.type == Element::f64 || item.out.type == Element::f64;
    for (const Strided& m : item.moments) wide = wide || (m.data && m.type == Element::f64);
    unfold(e, batch.data(), batch.data() + batch.size(), wide);
  }

  void finish() {
    for (const bool wide : {false, true}) flush(wide);
  }

 private:
  struct Filled {
    LineTable table;
    int64_t factors = 0, partials = 0;  // numbers of scratch
  };

  void unfold(LineEntry e, const Dim<4>* begin, const Dim<4>* end, bool wide) {
    if (end - begin > 1) {
      for (int64_t i = 0; i < begin->size; ++i) {
        unfold(e, begin + 1, end, wide);
        e.x += begin->stride[0] * size_of(e.type);
        e.out += begin->stride[1] * size_of(e.out_type);
        for (int side = 0; side < 2; ++side) {
          if (!e.moments[side]) continue;
          e.moments[side] += begin->stride[2 + side] * size_of(e.moment_type[side]);
        }
      }
      return;
    }
    const int64_t matrices = begin == end ? 1 : begin->size;
    e.x_stride[0] = begin == end ? 0 : begin->stride[0];
    e.out_stride[0] = begin == end ? 0 : begin->stride[1];
    for (int side = 0; side < 2; ++side) {
      e.moment_stride[side][0] = begin == end ? 0 : begin->stride[2 + side];
    }
    push(e, matrices, wide);
  }

  void push(LineEntry e, int64_t matrices, bool wide) {
    const int64_t down = (e.lines[rows_side] + tile_rows - 1) / tile_rows;
    const int64_t across = (e.lines[columns_side] + tile_columns - 1) / tile_columns;
    int64_t groups = 0;
    for (int side = 0; side < 2; ++side) {
      groups += e.sums[side] ? (e.lines[side] + group_lines - 1) / group_lines : 0;
    }
    if (down * across * matrices > INT32_MAX || groups * matrices > INT32_MAX) {
      throw std::length_error("more tiles than a launch can count");
    }
    auto& slot = filled_[wide];
    if (!slot) slot = std::make_unique<Filled>();
    if (slot->table.entries_used == LineTable::most_entries ||
        slot->table.tiles + down * across * matrices > INT32_MAX ||
        slot->table.groups + groups * matrices > INT32_MAX) {
      flush(wide);
    }
    LineTable& table = slot->table;
    e.across = static_cast<uint32_t>(across);
    e.tiles = static_cast<uint32_t>(down * across);
    e.groups = static_cast<uint32_t>(groups);
    e.first_tile = table.tiles;
    e.first_group = table.groups;
    for (int side = 0; side < 2; ++side) {
      if (!e.sums[side]) continue;
      e.factors[side] = slot->factors;
      e.partials[side] = slot->partials;
      slot->factors += matrices * e.lines[side];
      slot->partials += matrices * e.lines[side] * (side ? down : across);
    }
    table.tiles += static_cast<uint32_t>(matrices) * e.tiles;
    table.groups += static_cast<uint32_t>(matrices) * e.groups;
    table.entries[table.entries_used++] = e;
  }

  void flush(bool wide) {
    auto& filled = filled_[wide];
    if (!filled || filled->table.entries_used == 0) return;
    wide ? run<double>(*filled) : run<float>(*filled);
    *filled = Filled();
  }

  template <class A>
  void run(const Filled& filled) {
    const LineTable& table = filled.table;
    auto* partials = device_.scratch<Sum<A>>(filled.partials);
    auto* factors = device_.scratch<double>(filled.factors);
    auto* groups = device_.scratch<GroupSums>(table.groups);
    double* after = nullptr;
    launch(line_squares_kernel<A>, table.tiles, line_threads, 0, device_, table, partials);
    launch(line_factors_kernel<A>, table.groups, group_lines, 0, device_, table, rule_, partials,
           factors, groups);
    if (rule_.factored && rule_.keep_norm) {
      after = device_.scratch<double>(table.tiles);
      launch(line_norms_kernel<A>, table.tiles, line_threads, 0, device_, table, rule_, factors,
             groups, after);
    }
    launch(line_apply_kernel<A>, table.tiles, line_threads, 0, device_, table, rule_, factors,
           groups, after);
  }

  const Device& device_;
  const LineRule rule_;
  const bool wanted_[2];
  std::unique_ptr<Filled> filled_[2];
};

}  // namespace orthonorm::cuda
