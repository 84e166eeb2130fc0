// Q with Q X = p(X) for R = X X^T, all of R's chain in a cluster: device part and launches.
#pragma once

#include "cluster_products.h"
#include "small_gram_polynomial.h"

namespace orthonorm::cuda {

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    cluster_gram_polynomial_kernel(ORTHONORM_CONSTANT(SmallTable) table,
                                   ORTHONORM_CONSTANT(SmallPolynomial) polynomial) {
  using T = typename S::T;
  ORTHONORM_DYNAMIC_SHARED(T, memory);
  const int rank = rank_in_cluster(), first = rank * S::tile;
  const uint32_t matrix = blockIdx.x / S::blocks;
  const SmallEntry& entry = locate<&SmallEntry::first_block>(table, matrix);
  const int64_t b = matrix - entry.first_block;
  T *const R = memory, *const Q = R + S::tile * S::ld, *const Z = Q + S::tile * S::ld;
  const Share<S> share(rank, entry.rows, Z + S::tile * S::ld);
  clear<S>(R, S::ld);
  clear<S>(Q, S::ld);
  fetch<S>(R, S::ld, SmallView(entry.x, entry.x_stride, b, entry).rows(first, S::tile), 1.0);
  for (int i = threadIdx.x; i < S::tile && first + i < entry.rows; i += S::threads) {
    Q[i * S::ld + first + i] = rounded<T>(1.0f);
  }
  cluster_sync();
  gram_iterations(R, Q, Z, polynomial,
                  [&](T* to, const T* left, const T* right, float alpha, float beta) {
                    symmetric_sum(share, to, left, left, right, S::ld, share.strips * S::tile,
                                  alpha, beta);
                  });
  deliver<S>(Q, S::ld, SmallView(entry.out, entry.out_stride, b, entry).rows(first, S::tile));
}

template <class S>
void launch_gram_polynomial(const SmallTable& table, const SmallPolynomial& polynomial,
                            const Device& device) {
  constexpr int bytes = 3 * S::bytes(S::ld) + S::staged_bytes;
  static_assert(bytes <= most_shared<S>);
  launch_clusters(cluster_gram_polynomial_kernel<S>, S::blocks, int64_t{table.matrices} * S::blocks,
                  S::threads, bytes, device, table, polynomial);
}

// Of any side: in a block as long as they fit one.
template <class T>
SmallLists gram_polynomial_lists(const Device& device, const SmallPolynomial& polynomial) {
  return SmallLists([=, &device](const SmallTable& table, int size) {
    switch (size) {
      case 4: return launch_gram_polynomial<Strips<T, 4>>(table, polynomial, device);
      case 5: return launch_gram_polynomial<Strips<T, 8>>(table, polynomial, device);
      default: return launch_small_gram_polynomial<T>(table, size, polynomial, device);
    }
  });
}

}  // namespace orthonorm::cuda
