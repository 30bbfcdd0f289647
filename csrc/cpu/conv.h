// Convolutions with one set of weights per task, on the CPU: plain pointers, no torch.
//
//   y[b,n,p,o]  = bias[b,o] + sum over taps t, channels c of  x[b,n,source(p,t),c] w[b,o,c,t]
//   dx[b,n,q,c] = sum over taps t, filters o of  g[b,n,target(q,t),o] w[b,o,c,t]
//   dw[b,o,c,t] = sum over images n, pixels p of  x[b,n,source(p,t),c] g[b,n,p,o]
//
// Except for the bias, all three are linear in each operand, and each is a derivative of the
// others: a network can be differentiated to any order with them.
//
// No column matrix is built. A tile of kTileRows pixels by kTileLanes outputs stays in registers
// and gathers its pixels through pointers; for the weight gradient, a tile is kTileRows weights of
// kTileLanes filters. Pixels are grouped by the taps that are inside the image, so that no product
// with padding is computed. Work is divided by task, or by blocks of kTileLanes filters or channels
// where tasks are few; no sum is split: the same input gives the same bits for any number of
// threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv_shape.h"
#include "cpu/blocks.h"
#include "cpu/pixel_map.h"
#include "cpu/weight_plan.h"

namespace imaml::cpu {

// A cache line of outputs.
template <typename T>
inline constexpr int64_t kTileLanes = 64 / static_cast<int64_t>(sizeof(T));
inline constexpr int64_t kTileRows = 6;

#define IMAML_DECLARE(T)                                                                           \
  void conv_blocks(const ConvShape&, const PixelMap&, const T* x, const T* w, const T* bias, T* y, \
                   int64_t task, Blocks);                                                          \
  void conv_data_blocks(const ConvShape&, const PixelMap&, const T* g, const T* w, T* dx,          \
                        int64_t task, Blocks);                                                     \
  void conv_weight_blocks(const ConvShape&, const WeightPlan&, const T* x, const T* g, T* dw,      \
                          int64_t task, Blocks);
IMAML_DECLARE(float)
IMAML_DECLARE(double)
#undef IMAML_DECLARE

template <typename T>
int64_t tile_blocks(int64_t outputs) {
  return (outputs + kTileLanes<T> - 1) / kTileLanes<T>;
}

// `bias` may be null.
template <typename T, typename ParallelFor>
void conv(const ConvShape& s, const T* x, const T* w, const T* bias, T* y, int threads,
          const ParallelFor& parallel_for) {
  const PixelMap map = output_pixels(s);
  for_blocks(
      s.tasks, tile_blocks<T>(s.filters), threads, parallel_for,
      [&](int64_t task, Blocks blocks) { conv_blocks(s, map, x, w, bias, y, task, blocks); });
}

template <typename T, typename ParallelFor>
void conv_data_gradient(const ConvShape& s, const T* g, const T* w, T* dx, int threads,
                        const ParallelFor& parallel_for) {
  const PixelMap map = input_pixels(s);
  for_blocks(
      s.tasks, tile_blocks<T>(s.channels), threads, parallel_for,
      [&](int64_t task, Blocks blocks) { conv_data_blocks(s, map, g, w, dx, task, blocks); });
}

// dw[b] are task_stride elements apart.
template <typename T, typename ParallelFor>
void conv_weight_gradient(const ConvShape& s, const T* x, const T* g, T* dw, int threads,
                          const ParallelFor& parallel_for) {
  const WeightPlan plan = weight_plan(s, kTileLanes<T>);
  for_blocks(
      s.tasks, tile_blocks<T>(plan.slots.empty() ? s.filters : s.channels), threads, parallel_for,
      [&](int64_t task, Blocks blocks) { conv_weight_blocks(s, plan, x, g, dw, task, blocks); });
}

}  // namespace imaml::cpu
