// X <- a X + (b A + c A^2) X with A = X X^T, X in a cluster of blocks: device part and launches.
#pragma once

#include "cluster_products.h"
#include "small_lists.h"

namespace orthonorm::cuda {

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    cluster_direct_polynomial_kernel(ORTHONORM_CONSTANT(SmallTable) table,
                                     ORTHONORM_CONSTANT(SmallPolynomial) polynomial) {
  using T = typename S::T;
  ORTHONORM_DYNAMIC_SHARED(T, memory);
  const int rank = rank_in_cluster(), first = rank * S::tile;
  const uint32_t matrix = blockIdx.x / S::blocks;
  const SmallEntry& entry = locate<&SmallEntry::first_block>(table, matrix);
  const int64_t b = matrix - entry.first_block;
  const int columns = S::columns(entry.columns), ld = columns + 8;
  T *const A = memory, *const X = A + S::tile * S::ld;
  const Share<S> share(rank, entry.rows, X + S::tile * ld);
  clear<S>(X, ld);
  fetch<S>(X, ld, SmallView(entry.x, entry.x_stride, b, entry).rows(first, S::tile), 1.0);
  cluster_sync();
#pragma unroll 1
  for (int t = 0; t < polynomial.iterations; ++t) {
    const float* const abc = polynomial.coefficients + 3 * t;
    const float b1 = abc[1], c = abc[2];
    const bool square = c != 0;
#pragma unroll 1
    for (int product = 0; product < (square ? 2 : 1); ++product) {  // one copy of code
      const bool again = product == 1;
      symmetric_sum(share, A, again ? A : nullptr, again ? A : X, again ? A : X,
                    again ? S::ld : ld, again ? share.strips * S::tile : columns,
                    again ? c : square ? 1 : b1, b1);
    }
    apply(share, X, ld, columns, A, abc[0]);
  }
  deliver<S>(X, ld, SmallView(entry.out, entry.out_stride, b, entry).rows(first, S::tile));
}

template <class S>
void launch_direct_polynomial(const SmallTable& table, const SmallPolynomial& polynomial,
                              const Device& device) {
  constexpr int most = S::bytes(S::ld) + S::bytes(S::most_wide * S::tile + 8) + S::staged_bytes;
  static_assert(most <= most_shared<S>);
  const int bytes = S::bytes(S::ld) + S::bytes(S::columns(table.columns) + 8) + S::staged_bytes;
  launch_clusters(cluster_direct_polynomial_kernel<S>, S::blocks,
                  int64_t{table.matrices} * S::blocks, S::threads, bytes, device, table,
                  polynomial);
}

template <class T>
SmallLists direct_polynomial_lists(const Device& device, const SmallPolynomial& polynomial) {
  return SmallLists([=, &device](const SmallTable& table, int size) {
    if (size <= 4) return launch_direct_polynomial<Strips<T, 4>>(table, polynomial, device);
    launch_direct_polynomial<Strips<T, 8>>(table, polynomial, device);
  });
}

}  // namespace orthonorm::cuda
