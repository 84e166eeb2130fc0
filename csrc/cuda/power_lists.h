// Lists of matrices for power iteration: cut into tables and launched.
#pragma once

#include "power_steps.h"

namespace orthonorm::cuda {

class PowerLists {
 public:
  // `sigmas`: a number of `type` for every matrix of the list, zero at first.
  PowerLists(const Device& device, const PowerRule& rule, char* sigmas, Element type)
      : device_(device), rule_(rule), sigmas_(sigmas), type_(type) {}

  // A (batch of) m x n matrices, `left` of m numbers each and `right` of n. The other way round if
  // `transposed`: steps begin with W^T left.
  void add(const Strided& w, const Strided& left, const Strided& right, bool transposed) {
    const int64_t count = matrices(w), row = w.dim - 2, column = w.dim - 1;
    const int64_t sizes[2] = {w.sizes[row], w.sizes[column]};
    const Strided* vectors[2] = {&left, &right};
    PowerEntry e{};
    e.w = w.data, e.type = w.type;
    e.left = vectors[transposed]->data, e.left_type = vectors[transposed]->type;
    e.right = vectors[!transposed]->data, e.right_type = vectors[!transposed]->type;
    e.rows = sizes[transposed], e.columns = sizes[!transposed];
    e.w_stride[1] = w.strides[transposed ? column : row];
    e.w_stride[2] = e.columns == 1 ? 1 : w.strides[transposed ? row : column];
    e.left_stride[1] = vectors[transposed]->strides[row];
    e.right_stride[1] = vectors[!transposed]->strides[row];
    e.place = static_cast<int32_t>(place_);
    place_ += count;
    if (place_ > INT32_MAX) throw std::length_error("more matrices than a launch can count");
    if (numel(w) == 0) return;
    const auto batch = dims_of<3>({w, *vectors[transposed], *vectors[!transposed]}, 0, row, false);
    unfold(e, batch.data(), batch.data() + batch.size());
  }

  void finish() {
    for (int k = 0; k < 4; ++k) flush(k);
  }

 private:
  // Of a block that has a matrix to itself.
  static constexpr int64_t small_rows = 128, small_columns = 1024;
  // Shared memory for rows: two blocks fit a multiprocessor that has 164 KB (sm_80).
  static constexpr int64_t most_stage = 72 * 1024;

  void unfold(PowerEntry e, const Dim<3>* begin, const Dim<3>* end) {
    if (end - begin > 1) {
      int64_t each = 1;
      for (const Dim<3>* d = begin + 1; d != end; ++d) each *= d->size;
      for (int64_t i = 0; i < begin->size; ++i) {
        unfold(e, begin + 1, end);
        e.w += begin->stride[0] * size_of(e.type);
        e.left += begin->stride[1] * size_of(e.left_type);
        e.right += begin->stride[2] * size_of(e.right_type);
        e.place += static_cast<int32_t>(each);
      }
      return;
    }
    const Dim<3> one{1, {}}, &batch = begin == end ? one : *begin;
    e.w_stride[0] = batch.stride[0];
    e.left_stride[0] = batch.stride[1];
    e.right_stride[0] = batch.stride[2];
    push(e, batch.size);
  }

  void push(PowerEntry e, int64_t count) {
    const int64_t longest = std::max(e.rows, (e.columns + 7) / 8 * 8);
    const int64_t tiles = (e.rows + power_rows - 1) / power_rows;
    const int64_t blocks = (longest + power_threads - 1) / power_threads;
    if (tiles > INT32_MAX / count || blocks > INT32_MAX / count) {
      throw std::length_error("more tiles than a launch can count");
    }
    const bool wide = e.type == Element::f64;
    const bool small = e.rows <= small_rows && e.columns <= small_columns;
    auto& slot = tables_[2 * wide + small];
    if (!slot) slot = std::make_unique<PowerTable>();
    if (slot->entries_used == PowerTable::most_entries ||
        slot->tiles + tiles * count > INT32_MAX || slot->blocks + blocks * count > INT32_MAX) {
      flush(2 * wide + small);
    }
    PowerTable& table = *slot;
    e.tiles = static_cast<uint32_t>(tiles), e.blocks = static_cast<uint32_t>(blocks);
    e.first_tile = table.tiles, e.first_block = table.blocks, e.first_matrix = table.matrices;
    e.memory = table.bytes;
    e.bytes = wide ? PowerMemory<double>(nullptr, e).bytes : PowerMemory<float>(nullptr, e).bytes;
    table.tiles += static_cast<uint32_t>(tiles * count);
    table.blocks += static_cast<uint32_t>(blocks * count);
    table.matrices += static_cast<uint32_t>(count);
    table.bytes += e.bytes * count;
    const int64_t rows = power_warps * size_of(e.type) * (e.columns / 8 * 8);
    table.stage = std::max(table.stage, std::min(rows, most_stage));
    table.entries[table.entries_used++] = e;
  }

  void flush(int k) {
    auto& table = tables_[k];
    if (!table || table->entries_used == 0) return;
    k / 2 ? run<double>(*table, k % 2) : run<float>(*table, k % 2);
    *table = PowerTable();
  }

  template <class A>
  void run(const PowerTable& table, bool small) {
    char* const scratch = device_.scratch<char>(table.bytes);
    if (small) {
      launch(small_power_kernel<A>, table.matrices, power_threads, table.stage, device_, table,
             rule_, scratch, sigmas_, type_);
      return;
    }
    const auto phase = [&](auto* kernel, uint32_t blocks) {
      launch(kernel, blocks, power_threads, 0, device_, table, rule_.eps, scratch, sigmas_, type_);
    };
    phase(power_kernel<A, Phase::start>, table.blocks);
    for (int64_t step = 0; step < std::max<int64_t>(rule_.steps, 1); ++step) {
      launch(power_sweep_kernel<A>, table.tiles, power_threads, table.stage, device_, table,
             scratch);
      if (rule_.steps == 0) break;
      phase(power_kernel<A, Phase::combine>, table.blocks);
      const bool last = step + 1 == rule_.steps;
      phase(last ? power_kernel<A, Phase::last> : power_kernel<A, Phase::vectors>, table.blocks);
    }
    if (rule_.steps == 0) phase(power_kernel<A, Phase::evaluate>, table.matrices);
  }

  const Device& device_;
  const PowerRule rule_;
  char* const sigmas_;
  const Element type_;
  std::unique_ptr<PowerTable> tables_[4];
  int64_t place_ = 0;
};

}  // namespace orthonorm::cuda
