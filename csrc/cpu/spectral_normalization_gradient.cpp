// The gradient of W / sigma, u and v being constants: G and W come from memory once.
//
// Inner products are added up by blocks of rows, whose height depends on the shape alone. Matrices
// are taken in portions that fit the cache, where the second pass over them finds them.
#include "../power_schedule.h"
#include "layout.h"

namespace orthonorm {
namespace {

constexpr const char* OP = "spectral_normalization_gradient";
constexpr int64_t PORTION = 1 << 17;  // elements
constexpr int64_t PIECE = 1024;       // elements converted at a time

// One matrix of a tensor, or a vector as its only row.
struct View {
  char* data;
  ScalarType dtype;
  int64_t row_stride, col_stride;

  char* at(int64_t i, int64_t j) const {
    return data + (i * row_stride + j * col_stride) * element_size(dtype);
  }
  template <class A>
  const A* load(int64_t i, int64_t j, int64_t count, A* scratch) const {
    return orthonorm::load(at(i, j), dtype, col_stride, count, scratch);
  }
};

struct Job {
  View G, W, D, u, v;
  int64_t rows, cols;
  double sigma;
  power::Cut cut;
  int64_t first_block;  // blocks of all jobs before

  bool wide() const { return G.dtype == ScalarType::Double || W.dtype == ScalarType::Double; }
};

// The sum of x y with lanes of double in one order; of doubles, whose products may leave the range,
// that of x (y / sigma).
template <class A>
double inner(const A* x, const A* y, double sigma, int64_t count) {
  constexpr int64_t L = 16;
  double lanes[L] = {};
  const auto product = [=](int64_t j) {
    const double right = y[j];
    return x[j] * (sizeof(A) == 8 ? right / sigma : right);
  };
  specialized([&] {
    int64_t j = 0;
    for (; j + L <= count; j += L) {
      for (int64_t l = 0; l < L; ++l) lanes[l] += product(j + l);
    }
    for (int64_t l = 0; j < count; ++j, ++l) lanes[l] += product(j);
  });
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// <G, W> / sigma of some rows.
template <class A>
double inner_block(const Job& m, int64_t first, int64_t last) {
  alignas(64) A scratch[2][PIECE];
  double sum = 0;
  for (int64_t i = first; i < last; ++i) {
    for (int64_t j = 0; j < m.cols; j += PIECE) {
      const int64_t count = std::min(PIECE, m.cols - j);
      const A* const G = m.G.load(i, j, count, scratch[0]);
      sum += inner(G, m.W.load(i, j, count, scratch[1]), m.sigma, count);
    }
  }
  return sizeof(A) == 8 ? sum : sum / m.sigma;
}

// D = G / sigma - product / sigma u v^T.
template <class A>
void write_block(const Job& m, int64_t first, int64_t last, double product) {
  alignas(64) A scratch[3][PIECE];
  const A sigma = static_cast<A>(m.sigma);
  for (int64_t i = first; i < last; ++i) {
    A u;
    load_into(m.u.at(0, i), m.u.dtype, 1, 1, &u);
    const A factor = static_cast<A>(product / m.sigma * u);
    for (int64_t j = 0; j < m.cols; j += PIECE) {
      const int64_t count = std::min(PIECE, m.cols - j);
      const A* const G = m.G.load(i, j, count, scratch[0]);
      const A* const v = m.v.load(0, j, count, scratch[1]);
      A* const D = target(m.D.at(i, j), m.D.dtype, m.D.col_stride, scratch[2]);
      specialized([=] {
        A* __restrict out = D;
        for (int64_t k = 0; k < count; ++k) out[k] = G[k] / sigma - factor * v[k];
      });
      store(D, m.D.at(i, j), m.D.dtype, m.D.col_stride, count);
    }
  }
}

class Jobs {
 public:
  Jobs(const TensorList& G, const TensorList& W, const Tensor& sigma, const Tensor& vectors) {
    STD_TORCH_CHECK(G.size() == W.size(), OP, ": lists must have equal lengths, got ", G.size(),
                    " grads and ", W.size(), " W");
    STD_TORCH_CHECK(sigma.dim() == 1 && vectors.dim() == 1, OP,
                    ": sigma and vectors must have one dimension");
    STD_TORCH_CHECK(floating(vectors.scalar_type()), OP, ": vectors must be floating-point");
    for (size_t i = 0; i < G.size(); ++i) {
      result_.push_back(torch::stable::new_empty(G[i], G[i].sizes()));
      add(i, Facts(G[i]), Facts(W[i]), Facts(result_[i]), sigma, vectors);
    }
    STD_TORCH_CHECK(sigma.numel() == matrices_, OP, ": sigma must have ", matrices_,
                    " numbers, got ", sigma.numel());
    STD_TORCH_CHECK(vectors.numel() == length_, OP, ": vectors must have ", length_,
                    " numbers, got ", vectors.numel());
    products_.resize(blocks_);
  }

  TensorList run() {
    for (size_t begin = 0, end = 0; begin < jobs_.size(); begin = end) {
      for (int64_t count = 0; end < jobs_.size() && count < PORTION; ++end) {
        count += jobs_[end].rows * jobs_[end].cols;
      }
      each_block(begin, end, [&]<class A>(const Job& m, int64_t block, int64_t first, int64_t last,
                                          A) { products_[block] = inner_block<A>(m, first, last); });
      each_block(begin, end, [&]<class A>(const Job& m, int64_t, int64_t first, int64_t last, A) {
        double product = 0;
        for (int64_t b = 0; b < m.cut.blocks; ++b) product += products_[m.first_block + b];
        write_block<A>(m, first, last, product);
      });
    }
    return std::move(result_);
  }

 private:
  void add(size_t i, const Facts& g, const Facts& w, const Facts& d, const Tensor& sigma,
           const Tensor& vectors) {
    STD_TORCH_CHECK(w.dim >= 2, OP, ": W[", i, "] must have at least 2 dimensions, got shape ",
                    w.shape());
    STD_TORCH_CHECK(g.same_shape(w), OP, ": grads[", i, "] must have the shape of W[", i, "] ",
                    w.shape(), ", got ", g.shape());
    STD_TORCH_CHECK(floating(g.dtype) && floating(w.dtype), OP,
                    ": tensors must be float32, float64, bfloat16 or float16");
    const int64_t rows = w.sizes[w.dim - 2], cols = w.sizes[w.dim - 1];
    int64_t batch = 1;
    for (int64_t k = 0; k < w.dim - 2; ++k) batch *= w.sizes[k];
    for (int64_t b = 0; b < batch; ++b, ++matrices_, length_ += rows + cols) {
      if (rows == 0 || cols == 0 || matrices_ >= sigma.numel()) continue;
      const int64_t step = vectors.stride(0);
      const View all{static_cast<char*>(vectors.data_ptr()), vectors.scalar_type(), 0, step};
      const View u{all.at(0, length_), all.dtype, 0, step};
      const View v{all.at(0, length_ + rows), all.dtype, 0, step};
      const double size = item(sigma, matrices_);
      const power::Cut cut(rows, cols);
      jobs_.push_back({matrix(g, b), matrix(w, b), matrix(d, b), u, v, rows, cols,
                       size == 0 ? 1 : size, cut, blocks_});
      blocks_ += cut.blocks;
    }
  }

  // Matrix b of the batch.
  static View matrix(const Facts& t, int64_t b) {
    int64_t offset = 0;
    for (int64_t d = t.dim - 2; d-- > 0; b /= t.sizes[d]) offset += b % t.sizes[d] * t.strides[d];
    return {t.data + offset * element_size(t.dtype), t.dtype, t.strides[t.dim - 2],
            t.strides[t.dim - 1]};
  }

  // Calls f(job, block, first row, last row, A) for all blocks of jobs [begin, end).
  template <class F>
  void each_block(size_t begin, size_t end, const F& f) const {
    const Job &front = jobs_[begin], &back = jobs_[end - 1];
    const int64_t start = front.first_block, stop = back.first_block + back.cut.blocks;
    int64_t elements = 0;
    for (size_t i = begin; i < end; ++i) elements += jobs_[i].rows * jobs_[i].cols;
    const int64_t grain = std::max<int64_t>(1, (stop - start) * WORTH / std::max(elements, WORTH));
    parallel(stop - start, grain, [&](int64_t from, int64_t to) {
      auto job = std::partition_point(
          jobs_.begin() + begin, jobs_.begin() + end,
          [&](const Job& m) { return m.first_block + m.cut.blocks <= start + from; });
      for (int64_t block = start + from; block < start + to; ++block) {
        if (block == job->first_block + job->cut.blocks) ++job;
        const int64_t first = (block - job->first_block) * job->cut.rows;
        const int64_t last = std::min(first + job->cut.rows, job->rows);
        job->wide() ? f(*job, block, first, last, double()) : f(*job, block, first, last, float());
      }
    });
  }

  static constexpr int64_t WORTH = power::WORTH_A_THREAD;

  TensorList result_;
  std::vector<Job> jobs_;
  std::vector<double> products_;  // one per block
  int64_t matrices_ = 0, length_ = 0, blocks_ = 0;
};

TensorList spectral_normalization_gradient(const TensorList& grads, const TensorList& W,
                                           const Tensor& sigma, const Tensor& vectors) {
  return Jobs(grads, W, sigma, vectors).run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orthonorm, CPU, m) {
  m.impl("spectral_normalization_gradient", TORCH_BOX(&spectral_normalization_gradient));
}

}  // namespace orthonorm
