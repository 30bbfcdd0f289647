#include "cpu/panels.h"

#include "cpu/conv_tiles.h"
#include "cpu/isa.h"

namespace imaml::cpu {
namespace {

#define IMAML_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

// Transposes a square of vectors: row i is at from(i), and row i of the result goes to to(i). A row
// is loaded where it is first used, which spares registers.
template <typename From, typename To>
IMAML_INLINE void transpose(double, const From& from, const To& to) {
  using V = Vector<double>;
  const V r0 = vector_at(from(0)), r1 = vector_at(from(1));
  const V a = IMAML_SHUFFLE(r0, r1, 0, 4, 2, 6), b = IMAML_SHUFFLE(r0, r1, 1, 5, 3, 7);
  const V r2 = vector_at(from(2)), r3 = vector_at(from(3));
  const V c = IMAML_SHUFFLE(r2, r3, 0, 4, 2, 6), d = IMAML_SHUFFLE(r2, r3, 1, 5, 3, 7);
  vector_at(to(0)) = IMAML_SHUFFLE(a, c, 0, 1, 4, 5);
  vector_at(to(1)) = IMAML_SHUFFLE(b, d, 0, 1, 4, 5);
  vector_at(to(2)) = IMAML_SHUFFLE(a, c, 2, 3, 6, 7);
  vector_at(to(3)) = IMAML_SHUFFLE(b, d, 2, 3, 6, 7);
}

template <typename From, typename To>
IMAML_INLINE void transpose(float, const From& from, const To& to) {
  using V = Vector<float>;
  V fours[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const V r0 = vector_at(from(i)), r1 = vector_at(from(i + 1));
    const V a = IMAML_SHUFFLE(r0, r1, 0, 8, 1, 9, 4, 12, 5, 13);
    const V b = IMAML_SHUFFLE(r0, r1, 2, 10, 3, 11, 6, 14, 7, 15);
    const V r2 = vector_at(from(i + 2)), r3 = vector_at(from(i + 3));
    const V c = IMAML_SHUFFLE(r2, r3, 0, 8, 1, 9, 4, 12, 5, 13);
    const V d = IMAML_SHUFFLE(r2, r3, 2, 10, 3, 11, 6, 14, 7, 15);
    fours[i] = IMAML_SHUFFLE(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
    fours[i + 1] = IMAML_SHUFFLE(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
    fours[i + 2] = IMAML_SHUFFLE(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
    fours[i + 3] = IMAML_SHUFFLE(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    vector_at(to(i)) = IMAML_SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    vector_at(to(i + 4)) = IMAML_SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

#undef IMAML_SHUFFLE

// Calls square(k, lane) for whole squares of [0, count) x [0, width), and single(k, lane) for the
// other elements.
template <typename T, typename Square, typename Single>
IMAML_INLINE void for_squares(int64_t count, int64_t width, const Square& square,
                              const Single& single) {
  constexpr int64_t side = kTileLanes<T> / 2;
  const int64_t squares = count - count % side, lanes = width - width % side;
  for (int64_t k = 0; k < squares; k += side)
    for (int64_t lane = 0; lane < lanes; lane += side) square(k, lane);
  for (int64_t k = squares; k < count; ++k)
    for (int64_t lane = 0; lane < lanes; ++lane) single(k, lane);
  for (int64_t lane = lanes; lane < width; ++lane)
    for (int64_t k = 0; k < count; ++k) single(k, lane);
}

template <typename T>
IMAML_INLINE void pack(const WeightBlock& block, const T* weights, const int64_t* rows, T* panel) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t stride = block.lane_stride;
  for (int64_t i = 0; i < block.slices; ++i, weights += block.slice_stride, panel += lanes) {
    for_squares<T>(
        block.count, block.width,
        [&](int64_t k, int64_t lane) IMAML_INLINE_LAMBDA {
          transpose(
              T(), [&](int n) IMAML_INLINE_LAMBDA { return weights + (lane + n) * stride + k; },
              [&](int n) IMAML_INLINE_LAMBDA { return panel + rows[k + n] * lanes + lane; });
        },
        [&](int64_t k, int64_t lane)
            IMAML_INLINE_LAMBDA { panel[rows[k] * lanes + lane] = weights[lane * stride + k]; });
    for (int64_t k = 0; block.width < lanes && k < block.count; ++k)
      std::fill(panel + rows[k] * lanes + block.width, panel + (rows[k] + 1) * lanes, T(0));
  }
}

template <typename T>
IMAML_INLINE void unpack(const T* panel, int64_t width, int64_t count, T* weights, int64_t stride) {
  constexpr int64_t lanes = kTileLanes<T>;
  for_squares<T>(
      count, width,
      [&](int64_t k, int64_t lane) IMAML_INLINE_LAMBDA {
        transpose(
            T(), [&](int n) IMAML_INLINE_LAMBDA { return panel + (k + n) * lanes + lane; },
            [&](int n) IMAML_INLINE_LAMBDA { return weights + (lane + n) * stride + k; });
      },
      [&](int64_t k, int64_t lane)
          IMAML_INLINE_LAMBDA { weights[lane * stride + k] = panel[k * lanes + lane]; });
}

}  // namespace

#define IMAML_DEFINE(T)                                                                          \
  IMAML_MULTIVERSION void pack_panel(const WeightBlock& block, const T* weights,                 \
                                     const int64_t* rows, T* panel) {                            \
    pack<T>(block, weights, rows, panel);                                                        \
  }                                                                                              \
  IMAML_MULTIVERSION void unpack_panel(const T* panel, int64_t width, int64_t count, T* weights, \
                                       int64_t lane_stride) {                                    \
    unpack<T>(panel, width, count, weights, lane_stride);                                        \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
