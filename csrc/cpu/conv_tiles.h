// The register tile that the convolutions accumulate in: up to kTileRows rows of kTileLanes lanes.
#pragma once
#include <type_traits>

#include "cpu/conv.h"

namespace imaml::cpu {

// Pixels that are processed for all blocks before the next ones.
inline constexpr int64_t kChunkPixels = 96;

// Half a tile's lanes. A row of the tile is two of these: six rows take twelve of AVX2's sixteen
// vector registers and leave four for the factors.
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = float __attribute__((vector_size(32), aligned(4)));
};
template <>
struct VectorOf<double> {
  using type = double __attribute__((vector_size(32), aligned(8)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
struct Lanes {
  Vector<T> low, high;

  IMAML_INLINE static Lanes load(const T* from) {
    constexpr int64_t half = kTileLanes<T> / 2;
    return {*reinterpret_cast<const Vector<T>*>(from),
            *reinterpret_cast<const Vector<T>*>(from + half)};
  }
  IMAML_INLINE void store(T* to) const {
    constexpr int64_t half = kTileLanes<T> / 2;
    *reinterpret_cast<Vector<T>*>(to) = low;
    *reinterpret_cast<Vector<T>*>(to + half) = high;
  }
  IMAML_INLINE void add_product(T scalar, const Lanes& lanes) {
    low += scalar * lanes.low;
    high += scalar * lanes.high;
  }
};

// Calls add(std::integral_constant<int64_t, rows>, first) for tiles that together cover [0, count).
template <typename Add>
IMAML_INLINE void for_tiles(int64_t count, const Add& add) {
  int64_t first = 0;
  for (; first + kTileRows <= count; first += kTileRows)
    add(std::integral_constant<int64_t, kTileRows>{}, first);
  switch (count - first) {
    case 5:
      return add(std::integral_constant<int64_t, 5>{}, first);
    case 4:
      return add(std::integral_constant<int64_t, 4>{}, first);
    case 3:
      return add(std::integral_constant<int64_t, 3>{}, first);
    case 2:
      return add(std::integral_constant<int64_t, 2>{}, first);
    case 1:
      return add(std::integral_constant<int64_t, 1>{}, first);
  }
}

}  // namespace imaml::cpu
