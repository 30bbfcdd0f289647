// batched_product: y = op(a) op(b) for every task, where op transposes if requested.
//
// Bound by arithmetic for large reductions, by latency for small matrices, by memory for a short
// reduction of a long matrix. The cuBLAS kernel for these shapes has one small tile per block and
// does not divide the reduction, which leaves most of the device idle.
//
// A block computes a tile of y. Chunks of kChunk terms of both operands pass through registers into
// one of two buffers in shared memory while the other is multiplied; there they are stored term by
// term, whatever their order in memory. The warps of a block divide the tile, and warps with the
// same part of it divide the terms; the blocks of a cluster also divide the terms. Both kinds of
// partial sums are added in a fixed order, without atomics.
//
//   tile      y tile    used for
//   Wide      64 x 64   fewer than kLongReduction terms: the forward pass of the first layer (9
//                       terms), gradients with respect to images (one term per filter); float64
//   Deep      32 x 64   more terms, small matrices
//   Large     64 x 64   more terms, large matrices: 8 x 8 elements per thread instead of 8 x 4
//   Narrow    64 x 16   more terms, at most 16 columns: weight gradients of the first layer
//
// The choice and the number of blocks depend on the matrices' sizes and on whether the device has
// clusters, not on the number of tasks: a task has the same bits in every batch.
#pragma once
#include <type_traits>

#include "cuda/cluster.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace imaml::cuda {

// Lanes of a warp: kLanesM x kLanesN, each with 8 x kColumns elements of y.
template <unsigned kWarpsM_, unsigned kWarpsN_, unsigned kWarpsK_, unsigned kLanesN_,
          unsigned kColumns_, unsigned kChunk_>
struct ProductTile {
  static_assert(kWarpsM_ * kWarpsN_ * kWarpsK_ == kWarps);
  static constexpr unsigned kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr unsigned kLanesN = kLanesN_, kLanesM = kWarp / kLanesN;
  static constexpr unsigned kColumns = kColumns_;
  static constexpr unsigned kChunk = kChunk_, kQuads = kChunk / 4;
  static constexpr unsigned kWarpM = 8 * kLanesM, kWarpN = kColumns * kLanesN;
  static constexpr unsigned kM = kWarpM * kWarpsM, kN = kWarpN * kWarpsN;
  static constexpr unsigned kBuffer = kChunk * (kM + kN);  // elements
  static constexpr unsigned kPart = kM * kN;
  static constexpr unsigned kShared = 2 * kBuffer > kWarpsK* kPart ? 2 * kBuffer : kWarpsK* kPart;
};
using WideTile = ProductTile<2, 2, 2, 8, 4, 32>;
using DeepTile = ProductTile<1, 2, 4, 8, 4, 32>;
using LargeTile = ProductTile<2, 1, 4, 8, 8, 16>;
using NarrowTile = ProductTile<1, 1, 8, 4, 4, 32>;

template <typename T>
struct alignas(16) Quad {
  T v[4];
};

// In shared memory a term is a row of kWidth elements whose quads are permuted by exclusive or, so
// that neither stores (of a quad of terms) nor loads (of a quad of elements) conflict.
template <unsigned kWidth, unsigned kQuads>
__device__ unsigned swizzle(unsigned quad_of_terms) {
  constexpr unsigned kBanks = kWidth < 32 ? kWidth : 32;
  constexpr unsigned kStep = kBanks / kQuads < 4 ? 4 : kBanks / kQuads;
  return quad_of_terms * kStep % kBanks;
}

// A thread's share of the chunks of one operand, kWidth elements by kChunk terms: quads that are
// contiguous in memory, along the terms or across them. Elements that do not exist are replaced by
// others, or by 0: they only reach elements of y that do not exist.
template <unsigned kWidth, unsigned kChunk, bool kAlongTerms, typename T>
class OperandLoader {
 public:
  // `matrix` is row-major with `columns` columns. Reads elements `first` ... count - 1, starting
  // with term `term`.
  __device__ OperandLoader(const T* matrix, int64_t columns, int first, int count, int term)
      : step_(kAlongTerms ? kChunk : kChunk * columns),
        aligned_(columns % 4 == 0 && reinterpret_cast<std::uintptr_t>(matrix) % 16 == 0) {
    const int column = first + static_cast<int>(column_of());
    elements_ = count - column;
#pragma unroll
    for (unsigned i = 0; i < kItems; ++i) {
      if constexpr (kAlongTerms) {
        const int row = first + static_cast<int>(row_of(i));
        from_[i] = matrix + (row < count ? row : count - 1) * columns + term + column_of();
      } else {
        from_[i] = matrix + (term + int64_t{row_of(i)}) * columns +
                   (aligned_ && elements_ <= 0 ? count - 4 : column);
      }
    }
  }

  // Reads the next chunk; `left` terms are left, and the others 0.
  __device__ void load(int left) {
    if (left >= static_cast<int>(kChunk))
      load_chunk<true>(left);
    else
      load_chunk<false>(left);
#pragma unroll
    for (unsigned i = 0; i < kItems; ++i) from_[i] += step_;
  }

  __device__ void store(T* chunk) const {
    if (kIdle && threadIdx.x >= kWidth * kQuads) return;
#pragma unroll
    for (unsigned i = 0; i < kItems; ++i) {
      const unsigned term = term_of(i);
      const unsigned element =
          (kAlongTerms ? row_of(i) : column_of()) ^ swizzle<kWidth, kQuads>(term / 4);
      if constexpr (kAlongTerms) {
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) chunk[(term + j) * kWidth + element] = quads_[i].v[j];
      } else {
        *reinterpret_cast<Quad<T>*>(chunk + term * kWidth + element) = quads_[i];
      }
    }
  }

 private:
  static constexpr unsigned kQuads = kChunk / 4;
  static constexpr bool kIdle = kWidth * kQuads < kThreads;  // some threads load for nothing
  static constexpr unsigned kItems = kIdle ? 1 : kWidth * kQuads / kThreads;
  static constexpr unsigned kPerRow = kAlongTerms ? kQuads : kWidth / 4;
  static constexpr unsigned kRows = kAlongTerms ? kWidth : kChunk;

  static __device__ unsigned row_of(unsigned i) {
    return threadIdx.x / kPerRow % kRows + i * (kThreads / kPerRow);
  }
  static __device__ unsigned column_of() { return threadIdx.x % kPerRow * 4; }
  static __device__ unsigned term_of(unsigned i) { return kAlongTerms ? column_of() : row_of(i); }

  template <bool kWhole>
  __device__ void load_chunk(int left) {
    if (aligned_) {  // then a quad exists as a whole or not at all
#pragma unroll
      for (unsigned i = 0; i < kItems; ++i)
        quads_[i] = kWhole || static_cast<int>(term_of(i)) < left
                        ? *reinterpret_cast<const Quad<T>*>(from_[i])
                        : Quad<T>{};
      return;
    }
#pragma unroll
    for (unsigned i = 0; i < kItems; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool is_term = kWhole || static_cast<int>(term_of(i)) + (kAlongTerms ? j : 0) < left;
        quads_[i].v[j] = is_term && (kAlongTerms || j < elements_) ? from_[i][j] : T(0);
      }
  }

  const T* from_[kItems];
  int64_t step_;
  int elements_;  // from this thread's column on
  bool aligned_;
  Quad<T> quads_[kItems];
};

// A thread's elements of y.
template <typename Tile, typename T>
class Accumulator {
 public:
  // Adds this warp's share of the first `quads` quads of terms of a chunk.
  __device__ void add(const T* a, const T* b, unsigned quads) {
    a += warp_m() * Tile::kWarpM + group() * 4 * Tile::kM;
    b += warp_n() * Tile::kWarpN + group() * 4 * Tile::kN;
#pragma unroll
    for (unsigned quad = 0; quad < Tile::kQuads; quad += Tile::kWarpsK)
      if (quad + group() < quads) add_quad(a, b, quad);
  }

  // Writes the sums to this group's tile in `parts`.
  __device__ void put(T* parts) const {
    T* const part = parts + group() * Tile::kPart + warp_m() * Tile::kWarpM * Tile::kN +
                    warp_n() * Tile::kWarpN + lane_n() * 4;
#pragma unroll
    for (unsigned r = 0; r < 8; ++r)
#pragma unroll
      for (unsigned h = 0; h < Tile::kColumns / 4; ++h) {
        const unsigned row = r / 4 * 4 * Tile::kLanesM + lane_m() * 4 + r % 4;
        *reinterpret_cast<Quad<T>*>(part + row * Tile::kN + 32 * h) = sum_[r][h];
      }
  }

 private:
  static_assert(Tile::kColumns == 4 || Tile::kLanesN == 8);
  static __device__ unsigned warp() { return threadIdx.x / kWarp; }
  static __device__ unsigned warp_n() { return warp() % Tile::kWarpsN; }
  static __device__ unsigned warp_m() { return warp() / Tile::kWarpsN % Tile::kWarpsM; }
  static __device__ unsigned group() { return warp() / (Tile::kWarpsN * Tile::kWarpsM); }
  static __device__ unsigned lane_n() { return threadIdx.x % Tile::kLanesN; }
  static __device__ unsigned lane_m() { return threadIdx.x % kWarp / Tile::kLanesN; }

  // Quad `quad` after this group's first one, a multiple of kWarpsK.
  __device__ void add_quad(const T* a, const T* b, unsigned quad) {
    constexpr unsigned kHalves = Tile::kColumns / 4;
    const unsigned swizzle_a =
        swizzle<Tile::kM, Tile::kQuads>(group()) ^ swizzle<Tile::kM, Tile::kQuads>(quad);
    const unsigned swizzle_b =
        swizzle<Tile::kN, Tile::kQuads>(group()) ^ swizzle<Tile::kN, Tile::kQuads>(quad);
    const T* const a0 = a + quad * 4 * Tile::kM + ((lane_m() * 4) ^ swizzle_a);
    const T* const a1 = a + quad * 4 * Tile::kM + ((lane_m() * 4 + 4 * Tile::kLanesM) ^ swizzle_a);
    const T* const b0 = b + quad * 4 * Tile::kN + ((lane_n() * 4) ^ swizzle_b);
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
      Quad<T> m[2], n[kHalves];
      m[0] = *reinterpret_cast<const Quad<T>*>(a0 + j * Tile::kM);
      m[1] = *reinterpret_cast<const Quad<T>*>(a1 + j * Tile::kM);
#pragma unroll
      for (unsigned h = 0; h < kHalves; ++h)  // h = 1: 32 columns later, which are not permuted
        n[h] = *reinterpret_cast<const Quad<T>*>(b0 + j * Tile::kN + 32 * h);
#pragma unroll
      for (unsigned r = 0; r < 8; ++r)
#pragma unroll
        for (unsigned c = 0; c < Tile::kColumns; ++c)
          sum_[r][c / 4].v[c % 4] += m[r / 4].v[r % 4] * n[c / 4].v[c % 4];
    }
  }

  Quad<T> sum_[8][Tile::kColumns / 4] = {};
};

template <typename Tile, typename T>
__device__ T sum_of_groups(const T* parts, unsigned element) {
  T total = parts[element];
#pragma unroll
  for (unsigned g = 1; g < Tile::kWarpsK; ++g) total += parts[g * Tile::kPart + element];
  return total;
}

// Adds the sums of groups and blocks, and calls write(element of the tile, sum).
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
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
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
  combine<Tile>(shared, blocks, block, [&](unsigned element, T sum) {
    const int i = row + static_cast<int>(element / Tile::kN);
    const int j = column + static_cast<int>(element % Tile::kN);
    if (i < rows && j < columns) out[i * s.columns + j] = sum;
  });
}

// The blocks that divide the terms: until a task has `wanted` blocks, with kLeastTerms or more
// each.
inline int product_blocks(int64_t tiles, int64_t terms, int64_t wanted) {
  constexpr int64_t kLeastTerms = 64;
  int blocks = 1;
  while (blocks < kPortableCluster && tiles * blocks < wanted && terms >= 2 * blocks * kLeastTerms)
    blocks *= 2;
  return blocks;
}

template <typename Tile, bool kTransposeA, bool kTransposeB, typename T>
int launch_product(const ProductShape& s, const T* a, const T* b, T* y, int64_t wanted,
                   void* stream) {
  const auto kernel = product_kernel<Tile, kTransposeA, kTransposeB, T>;
  constexpr int64_t bytes = Tile::kShared * sizeof(T);
  const int64_t tiles_m = (s.rows + Tile::kM - 1) / Tile::kM;
  const int64_t tiles_n = (s.columns + Tile::kN - 1) / Tile::kN;
  const bool clusters =
      cluster_capacity(reinterpret_cast<const void*>(kernel), kPortableCluster, bytes) > 0;
  const int blocks = clusters ? product_blocks(tiles_m * tiles_n, s.terms, wanted) : 1;
  const int64_t share = ((s.terms + 3) / 4 + blocks - 1) / blocks * 4;
  return launch_clusters(kernel, s.tasks * tiles_m * tiles_n, blocks, bytes, stream, s, a, b, y,
                         static_cast<unsigned>(tiles_m), static_cast<unsigned>(tiles_n),
                         static_cast<int>(share), static_cast<unsigned>(blocks));
}

template <bool kTransposeA, bool kTransposeB, typename T>
int product_as(const ProductShape& s, const T* a, const T* b, T* y, void* stream) {
  constexpr int64_t kLongReduction = 128, kLargeProduct = int64_t{1} << 24;
  if constexpr (sizeof(T) == 4 && !(kTransposeA && kTransposeB))
    if (s.terms >= kLongReduction) {
      if constexpr (kTransposeA)
        if (s.columns <= NarrowTile::kN)
          return launch_product<NarrowTile, kTransposeA, kTransposeB>(s, a, b, y, 16, stream);
      if (s.rows * s.columns >= kLargeProduct / s.terms)
        return launch_product<LargeTile, kTransposeA, kTransposeB>(s, a, b, y, 32, stream);
      return launch_product<DeepTile, kTransposeA, kTransposeB>(s, a, b, y, 16, stream);
    }
  return launch_product<WideTile, kTransposeA, kTransposeB>(s, a, b, y, 16, stream);
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
