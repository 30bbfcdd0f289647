// Transposes between weights, where the values of one filter are contiguous, and panels of lanes.
#pragma once
#include "cpu/conv_tiles.h"

namespace imaml::cpu {

#define IMAML_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

// Transposes a square of vectors in registers.
IMAML_INLINE void transpose(Vector<double> (&v)[4]) {
  using V = Vector<double>;
  const V a = IMAML_SHUFFLE(v[0], v[1], 0, 4, 2, 6), b = IMAML_SHUFFLE(v[0], v[1], 1, 5, 3, 7);
  const V c = IMAML_SHUFFLE(v[2], v[3], 0, 4, 2, 6), d = IMAML_SHUFFLE(v[2], v[3], 1, 5, 3, 7);
  v[0] = IMAML_SHUFFLE(a, c, 0, 1, 4, 5);
  v[1] = IMAML_SHUFFLE(b, d, 0, 1, 4, 5);
  v[2] = IMAML_SHUFFLE(a, c, 2, 3, 6, 7);
  v[3] = IMAML_SHUFFLE(b, d, 2, 3, 6, 7);
}

IMAML_INLINE void transpose(Vector<float> (&v)[8]) {
  using V = Vector<float>;
  V pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = IMAML_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[2 * i + 1] = IMAML_SHUFFLE(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const V &a = pairs[i / 2 * 4 + i % 2], &b = pairs[i / 2 * 4 + 2 + i % 2];
    fours[i / 2 * 4 + i % 2 * 2] = IMAML_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
    fours[i / 2 * 4 + i % 2 * 2 + 1] = IMAML_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = IMAML_SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = IMAML_SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

#undef IMAML_SHUFFLE

// to_row(k)[lane] = from[lane * stride + k] for k in [0, count) and lanes in [0, width), and 0 for
// the other lanes.
template <typename T, typename ToRow>
IMAML_INLINE void transpose_to_lanes(const T* from, int64_t stride, int64_t width, int64_t count,
                                     const ToRow& to_row) {
  constexpr int64_t lanes = kTileLanes<T>, side = lanes / 2;
  int64_t k = 0;
  for (; k + side <= count; k += side)
    for (int64_t half = 0; half < lanes; half += side) {
      Vector<T> square[side];
#pragma GCC unroll 8
      for (int64_t i = 0; i < side; ++i)
        square[i] = half + i < width ? *reinterpret_cast<const Vector<T>*>(
                                           from + (half + i) * stride + k)
                                     : Vector<T>{};
      transpose(square);
#pragma GCC unroll 8
      for (int64_t i = 0; i < side; ++i)
        *reinterpret_cast<Vector<T>*>(to_row(k + i) + half) = square[i];
    }
  for (; k < count; ++k) {
    T* row = to_row(k);
    for (int64_t lane = 0; lane < lanes; ++lane)
      row[lane] = lane < width ? from[lane * stride + k] : T(0);
  }
}

// to[lane * stride + k] = from[k * lanes + lane] for k in [0, count) and lanes in [0, width).
template <typename T>
IMAML_INLINE void transpose_from_lanes(const T* from, int64_t width, int64_t count, T* to,
                                       int64_t stride) {
  constexpr int64_t lanes = kTileLanes<T>, side = lanes / 2;
  int64_t k = 0;
  for (; k + side <= count; k += side)
    for (int64_t half = 0; half < width; half += side) {
      Vector<T> square[side];
#pragma GCC unroll 8
      for (int64_t i = 0; i < side; ++i)
        square[i] = *reinterpret_cast<const Vector<T>*>(from + (k + i) * lanes + half);
      transpose(square);
#pragma GCC unroll 8
      for (int64_t i = 0; i < side; ++i)
        if (half + i < width)
          *reinterpret_cast<Vector<T>*>(to + (half + i) * stride + k) = square[i];
    }
  for (; k < count; ++k)
    for (int64_t lane = 0; lane < width; ++lane) to[lane * stride + k] = from[k * lanes + lane];
}

}  // namespace imaml::cpu
