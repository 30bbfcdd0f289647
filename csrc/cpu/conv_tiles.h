// The register tile that the convolutions accumulate in: up to kTileRows rows of kTileLanes lanes.
#pragma once
#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/conv.h"

namespace imaml::cpu {

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
IMAML_INLINE const Vector<T>& vector_at(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}
template <typename T>
IMAML_INLINE Vector<T>& vector_at(T* to) {
  return *reinterpret_cast<Vector<T>*>(to);
}

template <typename T>
struct Lanes {
  Vector<T> low, high;

  IMAML_INLINE static Lanes load(const T* from) {
    return {vector_at(from), vector_at(from + kTileLanes<T> / 2)};
  }
  IMAML_INLINE void store(T* to) const {
    vector_at(to) = low;
    vector_at(to + kTileLanes<T> / 2) = high;
  }
  IMAML_INLINE void add_product(T scalar, const Lanes& lanes) {
    low += scalar * lanes.low;
    high += scalar * lanes.high;
  }
};

// Calls add(std::integral_constant<int64_t, rows>, first) for tiles that together cover [0, count).
// They are as equal as possible: a tile of few rows waits for its own sums.
template <typename Add>
IMAML_INLINE void for_tiles(int64_t count, const Add& add) {
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0, first = 0; tile < tiles; ++tile) {
    const int64_t rows = (count - first) / (tiles - tile);
    switch (rows) {
      case 6:
        add(std::integral_constant<int64_t, 6>{}, first);
        break;
      case 5:
        add(std::integral_constant<int64_t, 5>{}, first);
        break;
      case 4:
        add(std::integral_constant<int64_t, 4>{}, first);
        break;
      case 3:
        add(std::integral_constant<int64_t, 3>{}, first);
        break;
      case 2:
        add(std::integral_constant<int64_t, 2>{}, first);
        break;
      default:
        add(std::integral_constant<int64_t, 1>{}, first);
    }
    first += rows;
  }
}

// Uninitialised memory in whole cache lines.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : values_(new(kAlignment) T[static_cast<std::size_t>(count)]) {}
  T* data() const { return values_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(T* values) const { ::operator delete[](values, kAlignment); }
  };
  std::unique_ptr<T[], Delete> values_;
};

}  // namespace imaml::cpu
