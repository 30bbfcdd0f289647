// batched_product: y = op(a) op(b) for every task, where op transposes if requested.
//
// Bound by arithmetic for large reductions, by latency for small matrices, by memory for a short
// reduction of a long matrix. The cuBLAS kernel for these shapes has one small tile per block and
// does not divide the reduction, which leaves most of the device idle.
//
// A block computes a tile of y. Chunks of terms of both operands pass through registers into one of
// two buffers in shared memory while the other is multiplied; there they are stored term by term,
// whatever their order in memory. The warps of a block divide the tile, and warps with the same
// part of it divide the terms; the blocks of a cluster also divide the terms. Both kinds of partial
// sums are added in a fixed order, without atomics.
//
//   tile      y tile    used for
//   Wide      64 x 64   at most kShort terms: the forward pass of the first layer (9 terms) and
//                       gradients with respect to images (a term per filter); also float64
//   Deep      32 x 64   more terms, small matrices
//   Large     64 x 64   more terms, large matrices: 8 x 8 elements per thread instead of 8 x 4
//   Narrow    64 x 16   more terms, at most 16 columns: the first layer's weight gradient
//
// A batch of 16 tasks fills a device of 132 multiprocessors. But the choice and the number of
// blocks depend on a task's matrices and on whether the device has clusters, not on the number of
// tasks: a task has the same bits in every batch.
#pragma once
#include <type_traits>

#include "cuda/cluster.cuh"
#include "cuda/launch.h"
#include "cuda/product_tile.cuh"

namespace imaml::cuda {

template <typename Tile, typename T>
__device__ T sum_of_groups(const T* parts, unsigned element) {
  T total = parts[element];
#pragma unroll
  for (unsigned g = 1; g < Tile::kWarpsK; ++g) total += parts[g * Tile::kPart + element];
  return total;
}

// Adds the sums of groups and blocks, and calls write(place in the tile, sum).
template <typename Tile, typename T, typename Write>
__device__ void combine(T* parts, unsigned blocks, unsigned block, const Write& write) {
  if (blocks == 1) {
#pragma unroll
    for (unsigned i = threadIdx.x; i < Tile::kPart; i += kThreads)
      write(i, sum_of_groups<Tile>(parts, i));
    return;
  }
#pragma unroll
  for (unsigned i = threadIdx.x; i < Tile::kPart; i += kThreads)
    parts[i] = sum_of_groups<Tile>(parts, i);
  cluster_sync(static_cast<int>(blocks));
  const unsigned share = Tile::kPart / blocks;
  for (unsigned i = threadIdx.x; i < share; i += kThreads) {
    T total = 0;
    for (unsigned other = 0; other < blocks; ++other)
      total += reinterpret_cast<const T*>(
          in_block(reinterpret_cast<double*>(parts), other))[block * share + i];
    write(block * share + i, total);
  }
  cluster_sync(static_cast<int>(blocks));  // a block must not exit while others read its sums
}

// Cluster c computes tile c % (tiles_m tiles_n) of task c / (tiles_m tiles_n). Its block j adds the
// terms j share ... (j + 1) share - 1.
template <typename Tile, bool kTransposeA, bool kTransposeB, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? Tile::kBlocks : 1)
    product_kernel(ProductShape s, const T* a, const T* b, T* y, unsigned tiles_m, unsigned tiles_n,
                   int share, unsigned blocks) {
  const unsigned block = blockIdx.x % blocks, cluster = blockIdx.x / blocks;
  const unsigned task = cluster / (tiles_m * tiles_n), tile = cluster % (tiles_m * tiles_n);
  const int row = static_cast<int>(tile / tiles_n * Tile::kM);
  const int column = static_cast<int>(tile % tiles_n * Tile::kN);
  const int rows = static_cast<int>(s.rows), columns = static_cast<int>(s.columns);
  const int first = static_cast<int>(block) * share;
  const int own = static_cast<int>(s.terms) - first;  // from this block's first one on
  const int terms = own < share ? own : share;

  OperandLoader<Tile::kM, Tile::kChunk, !kTransposeA, T> load_a(
      a + task * s.a_stride, kTransposeA ? s.rows : s.terms, row, rows, first);
  OperandLoader<Tile::kN, Tile::kChunk, kTransposeB, T> load_b(
      b + task * s.b_stride, kTransposeB ? s.terms : s.columns, column, columns, first);
  Accumulator<Tile, T> sums;
  const auto load = [&](int left) {
    load_a.load(left);
    load_b.load(left);
  };
  const auto store = [&](T* buffer) {
    load_a.store(buffer);
    load_b.store(buffer + Tile::kChunk * Tile::kM);
  };

  T* const shared = reinterpret_cast<T*>(dynamic_shared());
  T *buffer = shared, *next = shared + Tile::kBuffer;
  constexpr int kStep = Tile::kChunk;
  if (terms > 0) {
    load(terms);
    store(buffer);
  }
  __syncthreads();
  for (int left = terms; left > 0; left -= kStep) {
    if (left > kStep) load(left - kStep);
    const unsigned quads = left < kStep ? (static_cast<unsigned>(left) + 3) / 4 : Tile::kQuads;
    sums.add(buffer, buffer + Tile::kChunk * Tile::kM, quads);
    if (left > kStep) store(next);
    __syncthreads();
    T* const used = buffer;
    buffer = next;
    next = used;
  }

  sums.put(shared);
  __syncthreads();
  T* const out = y + task * s.rows * s.columns;
  combine<Tile>(shared, blocks, block, [&](unsigned place, T sum) {
    const unsigned element = permuted_element<Tile>(place);
    const int i = row + static_cast<int>(element / Tile::kN);
    const int j = column + static_cast<int>(element % Tile::kN);
    if (i < rows && j < columns) out[i * s.columns + j] = sum;
  });
}

// The blocks that divide the terms: until a task has `wanted` blocks, with kLeastTerms or more
// each.
inline int product_blocks(int64_t tiles, int64_t terms, int64_t most) {
  constexpr int64_t kLeastTerms = 64;
  int blocks = 1;
  while (blocks < kPortableCluster && 2 * blocks * tiles <= most &&
         2 * blocks * kLeastTerms <= terms)
    blocks *= 2;
  return blocks;
}

template <typename Tile, bool kTransposeA, bool kTransposeB, typename T>
int launch_product(const ProductShape& s, const T* a, const T* b, T* y, int64_t most,
                   void* stream) {
  const auto kernel = product_kernel<Tile, kTransposeA, kTransposeB, T>;
  constexpr int64_t bytes = Tile::kShared * sizeof(T);
  const int64_t tiles_m = (s.rows + Tile::kM - 1) / Tile::kM;
  const int64_t tiles_n = (s.columns + Tile::kN - 1) / Tile::kN;
  const bool clusters =
      cluster_capacity(reinterpret_cast<const void*>(kernel), kPortableCluster, bytes) > 0;
  const int blocks = clusters ? product_blocks(tiles_m * tiles_n, s.terms, most) : 1;
  const int64_t share = ((s.terms + 3) / 4 + blocks - 1) / blocks * 4;
  return launch_clusters(kernel, s.tasks * tiles_m * tiles_n, blocks, bytes, stream, s, a, b, y,
                         static_cast<unsigned>(tiles_m), static_cast<unsigned>(tiles_n),
                         static_cast<int>(share), static_cast<unsigned>(blocks));
}

template <bool kTransposeA, bool kTransposeB, typename T>
int product_as(const ProductShape& s, const T* a, const T* b, T* y, void* stream) {
  constexpr int64_t kShort = 64, kLargeProduct = int64_t{1} << 24;
  if constexpr (sizeof(T) == 4 && !(kTransposeA && kTransposeB))
    if (s.terms > kShort) {
      if constexpr (kTransposeA)
        if (s.columns <= NarrowTile::kN)
          return launch_product<NarrowTile, kTransposeA, kTransposeB>(s, a, b, y, 24, stream);
      if (s.rows * s.columns >= kLargeProduct / s.terms)
        return launch_product<LargeTile, kTransposeA, kTransposeB>(s, a, b, y, 72, stream);
      return launch_product<DeepTile, kTransposeA, kTransposeB>(s, a, b, y, 24, stream);
    }
  return launch_product<WideTile, kTransposeA, kTransposeB>(s, a, b, y, 24, stream);
}

template <typename T>
int batched_product(const ProductShape& s, const T* a, const T* b, T* y, void* stream) {
  if (s.tasks * s.rows * s.columns == 0) return 0;
  const auto run = [&](auto transpose_a, auto transpose_b) {
    return product_as<transpose_a.value, transpose_b.value>(s, a, b, y, stream);
  };
  const std::true_type yes;
  const std::false_type no;
  if (s.transpose_a) return s.transpose_b ? run(yes, yes) : run(yes, no);
  return s.transpose_b ? run(no, yes) : run(no, no);
}

}  // namespace imaml::cuda
