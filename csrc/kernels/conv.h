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
// The work is shared out by task and block of kTileLanes outputs, and no sum is ever split: the
// same input gives the same bits whatever the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace imaml::cpu {

using std::int64_t;

struct ConvShape {
  int64_t tasks, images;
  int64_t in_h, in_w, channels;
  int64_t out_h, out_w, filters;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;

  int64_t in_pixels() const { return in_h * in_w; }
  int64_t out_pixels() const { return out_h * out_w; }
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t weights() const { return filters * channels * taps(); }
};

// A cache line of outputs.
template <typename T>
inline constexpr int64_t kTileLanes = 64 / static_cast<int64_t>(sizeof(T));
inline constexpr int64_t kTileRows = 6;

inline int64_t tile_blocks(int64_t outputs, int64_t lanes) { return (outputs + lanes - 1) / lanes; }

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

#define IMAML_DECLARE(T)                                                                          \
  void conv_block(const ConvShape&, const PixelMap&, const T* x, const T* w, const T* bias, T* y, \
                  int64_t task, int64_t block);                                                   \
  void conv_data_block(const ConvShape&, const std::vector<PixelMap>&, const T* g, const T* w,    \
                       T* dx, int64_t task, int64_t block);                                       \
  void conv_weight_block(const ConvShape&, const PixelMap&, const T* x, const T* g, T* dw,        \
                         int64_t task, int64_t block);
IMAML_DECLARE(float)
IMAML_DECLARE(double)
#undef IMAML_DECLARE

// Calls body(task, block) for each block of outputs of each task.
template <typename T, typename ParallelFor, typename Body>
void for_blocks(int64_t tasks, int64_t outputs, const ParallelFor& parallel_for, const Body& body) {
  const int64_t blocks = tile_blocks(outputs, kTileLanes<T>);
  parallel_for(tasks * blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) body(item / blocks, item % blocks);
  });
}

// `bias` may be null.
template <typename T, typename ParallelFor>
void conv(const ConvShape& s, const T* x, const T* w, const T* bias, T* y,
          const ParallelFor& parallel_for) {
  const PixelMap map = output_pixels(s);
  for_blocks<T>(s.tasks, s.filters, parallel_for, [&](int64_t task, int64_t block) {
    conv_block(s, map, x, w, bias, y, task, block);
  });
}

template <typename T, typename ParallelFor>
void conv_data_gradient(const ConvShape& s, const T* g, const T* w, T* dx,
                        const ParallelFor& parallel_for) {
  const std::vector<PixelMap> maps = input_pixels(s);
  for_blocks<T>(s.tasks, s.channels, parallel_for, [&](int64_t task, int64_t block) {
    conv_data_block(s, maps, g, w, dx, task, block);
  });
}

template <typename T, typename ParallelFor>
void conv_weight_gradient(const ConvShape& s, const T* x, const T* g, T* dw,
                          const ParallelFor& parallel_for) {
  const PixelMap map = output_pixels(s);
  for_blocks<T>(s.tasks, s.filters, parallel_for, [&](int64_t task, int64_t block) {
    conv_weight_block(s, map, x, g, dw, task, block);
  });
}

}  // namespace imaml::cpu
