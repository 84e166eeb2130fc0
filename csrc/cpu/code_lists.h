// Lists of matrices beside their codes and scales, walked in blocks of `code_block` elements.
//
// Blocks are cut row by row whatever the strides, as codes are the same for equal numbers: a block
// that does not lie in one piece is gathered in L1. Threads share the blocks of all matrices.
#pragma once

#include "../block_codes.h"
#include "layout.h"

namespace orthonorm {

// One matrix of a list: numbers, or codes.
struct Grid {
  char* data;
  int64_t size;  // of an element in bytes
  int64_t columns, stride_row, stride_column;
  bool packed;

  char* at(int64_t row, int64_t column) const {
    return data + (row * stride_row + column * stride_column) * size;
  }

  // Calls f(address, stride, done, length) for the runs that `count` elements from `begin` are in.
  template <class F>
  void runs(int64_t begin, int64_t count, const F& f) const {
    int64_t row = begin / columns, column = begin % columns;
    for (int64_t done = 0; done < count; ++row, column = 0) {
      const int64_t length = std::min(count - done, columns - column);
      f(at(row, column), stride_column, done, length);
      done += length;
    }
  }
};

struct Coded {
  Grid x, codes;
  ScalarType dtype, scale_dtype;
  char* scales;
  int64_t stride_scale;
  int64_t count;        // elements
  int64_t first_block;  // blocks of all matrices before

  char* scale(int64_t block) const {
    return scales + block * stride_scale * element_size(scale_dtype);
  }
};

class CodeLists {
 public:
  // Checks what memory safety needs; nothing is written before. `write_x`: else codes and scales.
  CodeLists(const char* op, const char* x_name, const TensorList& X, const TensorList& codes,
            const TensorList& scales, bool write_x) {
    STD_TORCH_CHECK(X.size() == codes.size() && X.size() == scales.size(), op,
                    ": lists must have equal lengths, got ", X.size(), " ", x_name, ", ",
                    codes.size(), " codes and ", scales.size(), " scales");
    for (size_t i = 0; i < X.size(); ++i) {
      const Facts x(X[i]), c(codes[i]), s(scales[i]);
      check(op, x_name, i, x, c, s);
      STD_TORCH_CHECK(write_x ? !x.expanded() : !c.expanded() && !s.expanded(), op,
                      ": what is written must not be expanded, see entry ", i);
      add(x, c, s);
    }
  }

  // Calls f(matrix, block of it, first element, count) for every block of every matrix.
  template <class F>
  void run(const F& f) const {
    constexpr int64_t grain = 32768 / code_block;  // as `Pass` has it
    parallel(blocks_, grain, [&](int64_t begin, int64_t end) {
      auto m = std::partition_point(matrices_.begin(), matrices_.end(), [&](const Coded& c) {
        return c.first_block + blocks(c.count) <= begin;
      });
      for (int64_t b = begin; b < end; ++m) {
        const int64_t last = std::min(end, m->first_block + blocks(m->count));
        for (; b < last; ++b) {
          const int64_t block = b - m->first_block, first = block * code_block;
          f(*m, block, first, std::min(code_block, m->count - first));
        }
      }
    });
  }

 private:
  static int64_t blocks(int64_t count) { return (count + code_block - 1) / code_block; }

  static void check(const char* op, const char* x_name, size_t i, const Facts& x, const Facts& c,
                    const Facts& s) {
    STD_TORCH_CHECK(x.dim >= 2 && floating(x.dtype), op, ": ", x_name, "[", i,
                    "] must be matrices of float32, float64, bfloat16 or float16");
    STD_TORCH_CHECK(c.same_shape(x) && c.dtype == ScalarType::Byte, op, ": codes[", i,
                    "] must be uint8 of the shape ", x.shape(), ", got shape ", c.shape());
    bool fits = floating(s.dtype) && s.dim == x.dim - 1;
    for (int64_t d = 0; fits && d < x.dim - 2; ++d) fits = s.sizes[d] == x.sizes[d];
    fits = fits && s.sizes[s.dim - 1] == blocks(x.sizes[x.dim - 2] * x.sizes[x.dim - 1]);
    STD_TORCH_CHECK(fits, op, ": scales[", i, "] must have a number for each ", code_block,
                    " elements of a matrix of ", x.shape(), ", got shape ", s.shape());
  }

  static Grid grid(const Facts& t, int64_t size) {
    const int64_t d = t.dim - 2;
    return {t.data, size, t.sizes[d + 1], t.strides[d], t.strides[d + 1], t.contiguous(2)};
  }

  // Every matrix of a batch.
  void add(const Facts& x, const Facts& c, const Facts& s) {
    const int64_t batch_dims = x.dim - 2;
    const int64_t count = x.sizes[batch_dims] * x.sizes[batch_dims + 1];
    const int64_t batch = x.empty() ? 0
                                    : std::accumulate(x.sizes, x.sizes + batch_dims, int64_t{1},
                                                      std::multiplies<>());
    for (int64_t b = 0; b < batch; ++b) {
      Coded made{grid(x, element_size(x.dtype)), grid(c, 1),        x.dtype, s.dtype, s.data,
                 s.strides[s.dim - 1],           count, blocks_};
      for (int64_t d = batch_dims, rest = b; d-- > 0; rest /= x.sizes[d]) {
        const int64_t at = rest % x.sizes[d];
        made.x.data += at * x.strides[d] * made.x.size;
        made.codes.data += at * c.strides[d];
        made.scales += at * s.strides[d] * element_size(s.dtype);
      }
      matrices_.push_back(made);
      blocks_ += blocks(count);
    }
  }

  std::vector<Coded> matrices_;
  int64_t blocks_ = 0;
};

}  // namespace orthonorm
