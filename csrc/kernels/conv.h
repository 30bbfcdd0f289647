// Convolutions in which every task has its own weights, on the CPU: plain pointers, no torch.
//
//   y[b,n,p,o]  = bias[b,o] + sum over tap t, channel c of  x[b,n,source(t,p),c] w[b,o,c,t]
//   dx[b,n,q,c] = sum over tap t, filter o of  g[b,n,target(t,q),o] w[b,o,c,t]
//   dw[b,o,c,t] = sum over image n, pixel p of  x[b,n,source(t,p),c] g[b,n,p,o]
//
// But for the bias all three are linear in each operand, and each is the derivative of another:
// with them a network can be differentiated to any order. Images are [tasks, images, height, width,
// channels], so that a pixel's channels are contiguous; weights are [tasks, filters, channels,
// kernel_h, kernel_w], as in torch.nn.Conv2d.
//
// No column matrix is built: a tile of kTileRows pixels by kTileLanes outputs stays in registers
// while it gathers its pixels through pointers, zeros standing in for those outside the image.
// A few pixels at a time go through all blocks of kTileLanes outputs, whose weights stay in cache.
// The work is shared out by task, and by blocks where tasks are few, and no sum is ever split: the
// same input gives the same bits whatever the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "blocks.h"

namespace imaml::cpu {

using std::int64_t;

struct ConvShape {
  int64_t tasks, images;
  int64_t in_h, in_w, channels;
  int64_t out_h, out_w, filters;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t task_weights;  // values between the weights of tasks, where they are an operand

  int64_t in_pixels() const { return in_h * in_w; }
  int64_t out_pixels() const { return out_h * out_w; }
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t weights() const { return filters * channels * taps(); }
};

// A cache line of outputs.
template <typename T>
inline constexpr int64_t kTileLanes = 64 / static_cast<int64_t>(sizeof(T));
inline constexpr int64_t kTileRows = 6;

// Some of one image's pixels, which all see the same taps: where each pixel of the result is, and
// which pixel of the source it sees through each tap (-1: none, it is outside).
struct PixelMap {
  std::vector<int64_t> taps;
  std::vector<int64_t> pixels;
  std::vector<int64_t> sources;  // [taps, pixels]
};

// One map of the outputs.
PixelMap output_pixels(const ConvShape& s);

// A map of the inputs for each residue of (row, column) modulo the stride.
std::vector<PixelMap> input_pixels(const ConvShape& s);

#define IMAML_DECLARE(T)                                                                           \
  void conv_blocks(const ConvShape&, const PixelMap&, const T* x, const T* w, const T* bias, T* y, \
                   int64_t task, Blocks);                                                          \
  void conv_data_blocks(const ConvShape&, const std::vector<PixelMap>&, const T* g, const T* w,    \
                        T* dx, int64_t task, Blocks);                                              \
  void conv_weight_blocks(const ConvShape&, const PixelMap&, const T* x, const T* g, T* dw,        \
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
  const std::vector<PixelMap> maps = input_pixels(s);
  for_blocks(
      s.tasks, tile_blocks<T>(s.channels), threads, parallel_for,
      [&](int64_t task, Blocks blocks) { conv_data_blocks(s, maps, g, w, dx, task, blocks); });
}

template <typename T, typename ParallelFor>
void conv_weight_gradient(const ConvShape& s, const T* x, const T* g, T* dw, int threads,
                          const ParallelFor& parallel_for) {
  const PixelMap map = output_pixels(s);
  for_blocks(
      s.tasks, tile_blocks<T>(s.filters), threads, parallel_for,
      [&](int64_t task, Blocks blocks) { conv_weight_blocks(s, map, x, g, dw, task, blocks); });
}

}  // namespace imaml::cpu
