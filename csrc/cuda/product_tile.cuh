// A block's tile of a product (product.cuh): its shape, the loads of both operands, and the sums.
#pragma once
#include "cuda/device.cuh"

namespace imaml::cuda {

// Lanes of a warp: kLanesM x kLanesN, each with 8 x kColumns elements of y.
template <unsigned kWarpsM_, unsigned kWarpsN_, unsigned kWarpsK_, unsigned kLanesN_,
          unsigned kColumns_, unsigned kChunk_, unsigned kBlocks_>
struct ProductTile {
  static_assert(kWarpsM_ * kWarpsN_ * kWarpsK_ == kWarps);
  static constexpr unsigned kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr unsigned kLanesN = kLanesN_, kLanesM = kWarp / kLanesN;
  static constexpr unsigned kColumns = kColumns_;
  static constexpr unsigned kBlocks = kBlocks_;  // per multiprocessor, in float32
  static constexpr unsigned kChunk = kChunk_, kQuads = kChunk / 4;
  static constexpr unsigned kWarpM = 8 * kLanesM, kWarpN = kColumns * kLanesN;
  static constexpr unsigned kM = kWarpM * kWarpsM, kN = kWarpN * kWarpsN;
  static constexpr unsigned kBuffer = kChunk * (kM + kN);  // elements
  static constexpr unsigned kPart = kM * kN;
  static constexpr unsigned kShared = 2 * kBuffer > kWarpsK* kPart ? 2 * kBuffer : kWarpsK* kPart;
};
using WideTile = ProductTile<2, 2, 2, 8, 4, 32, 3>;
using DeepTile = ProductTile<1, 2, 4, 8, 4, 32, 3>;
using LargeTile = ProductTile<2, 1, 4, 8, 8, 16, 2>;
using NarrowTile = ProductTile<1, 1, 8, 4, 4, 32, 2>;

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
      : step_(static_cast<int>(kAlongTerms ? kChunk : kChunk * columns)),
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
  int step_;
  int elements_;  // from this thread's column on
  bool aligned_;
  Quad<T> quads_[kItems];
};

// Where sums are stored in a tile, so that stores by lanes of two rows do not conflict; its own
// inverse.
template <typename Tile>
__device__ unsigned permuted_element(unsigned element) {
  return element ^ (element / (4 * Tile::kN) % 2 * 16);
}

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

  // Writes the sums to this group's tile in `parts`, permuted by permuted_element.
  __device__ void put(T* parts) const {
    T* const part = parts + group() * Tile::kPart;
#pragma unroll
    for (unsigned r = 0; r < 8; ++r)
#pragma unroll
      for (unsigned h = 0; h < Tile::kColumns / 4; ++h) {
        const unsigned row =
            warp_m() * Tile::kWarpM + r / 4 * 4 * Tile::kLanesM + lane_m() * 4 + r % 4;
        const unsigned element = row * Tile::kN + warp_n() * Tile::kWarpN + lane_n() * 4 + 32 * h;
        *reinterpret_cast<Quad<T>*>(part + permuted_element<Tile>(element)) = sum_[r][h];
      }
  }

 private:
  static_assert(Tile::kColumns == 4 || Tile::kLanesN == 8);
  static __device__ unsigned warp() { return threadIdx.x / kWarp; }
  static __device__ unsigned warp_n() { return warp() % Tile::kWarpsN; }
  static __device__ unsigned warp_m() { return warp() / Tile::kWarpsN % Tile::kWarpsM; }
  static __device__ unsigned group() { return warp() / (Tile::kWarpsN * Tile::kWarpsM); }
  // Adjacent lanes are in one column, and pairs of them in one row: a load of 16 bytes per lane
  // then takes two passes instead of four.
  static __device__ unsigned lane_n() { return threadIdx.x / 2 % Tile::kLanesN; }
  static __device__ unsigned lane_m() {
    return threadIdx.x % kWarp / (2 * Tile::kLanesN) * 2 + threadIdx.x % 2;
  }

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

}  // namespace imaml::cuda
