// The convolution and its data gradient.
#include "cpu/conv.h"

#include "cpu/conv_tiles.h"
#include "cpu/isa.h"

namespace imaml::cpu {
namespace {

// The operands of one task.
template <typename T>
struct Gather {
  const T* source;       // [images, pixels, depth]
  int64_t source_image;  // elements per image
  int64_t depth;         // the sum is over these and the taps
  T* result;             // [images, pixels, outputs]
  int64_t result_image;  // elements per image
  int64_t outputs;
  Blocks blocks;
  const T* zeros;   // [depth]
  const T* panels;  // [blocks, all taps, depth, lanes]
  const T* bias;    // [outputs] or null
};

// The addresses of a chunk's pixels, computed once for all blocks: the divisions cost as much as a
// tap of a tile.
template <typename T>
struct Pixels {
  const T* image[kChunkPixels];
  int64_t pixel[kChunkPixels];  // in the map
  T* result[kChunkPixels];

  IMAML_INLINE Pixels(const Gather<T>& a, const PixelMap& map, int64_t begin, int64_t count) {
    const int64_t pixels = static_cast<int64_t>(map.pixels.size());
    int64_t n = begin / pixels, p = begin % pixels;
    for (int64_t r = 0; r < count; ++r) {
      image[r] = a.source + n * a.source_image;
      pixel[r] = p;
      result[r] =
          a.result + n * a.result_image + map.pixels[static_cast<std::size_t>(p)] * a.outputs;
      if (++p == pixels) {
        p = 0;
        ++n;
      }
    }
  }
};

// Computes kRows pixels of a chunk, from index `first` on, in the block that begins at `output`.
template <int64_t kRows, typename T>
IMAML_INLINE void gather_tile(const Gather<T>& a, const PixelMap& map, const Pixels<T>& chunk,
                              const T* panel, int64_t output, int64_t first) {
  const int64_t width = std::min(kTileLanes<T>, a.outputs - output);
  T lanes[kTileLanes<T>] = {};
  if (a.bias != nullptr) std::copy_n(a.bias + output, width, lanes);
  Lanes<T> total[kRows];
  for (Lanes<T>& row : total) row = Lanes<T>::load(lanes);
  const int64_t* sources = map.sources.data();
  for (const int64_t tap : map.taps) {
    const T* row[kRows];
    int64_t inside = -1;
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t source = sources[chunk.pixel[first + r]];
      row[r] = source < 0 ? a.zeros : chunk.image[first + r] + source * a.depth;
      inside = std::max(inside, source);
    }
    sources += map.pixels.size();
    if (inside < 0) continue;
    const T* factors = panel + tap * a.depth * kTileLanes<T>;
    for (int64_t k = 0; k < a.depth; ++k) {
      const Lanes<T> factor = Lanes<T>::load(factors + k * kTileLanes<T>);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) total[r].add_product(row[r][k], factor);
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    T* to = chunk.result[first + r] + output;
    if (width == kTileLanes<T>) {
      total[r].store(to);
    } else {
      total[r].store(lanes);
      std::copy_n(lanes, width, to);
    }
  }
}

template <typename T>
IMAML_INLINE void gather(const Gather<T>& a, const PixelMap& map, int64_t taps, int64_t images) {
  const int64_t rows = images * static_cast<int64_t>(map.pixels.size());
  for (int64_t begin = 0; begin < rows; begin += kChunkPixels) {
    const int64_t count = std::min(kChunkPixels, rows - begin);
    const Pixels<T> chunk(a, map, begin, count);
    for (int64_t block = a.blocks.first; block < a.blocks.last; ++block) {
      const T* panel = a.panels + (block - a.blocks.first) * taps * a.depth * kTileLanes<T>;
      for_tiles(count, [&](auto tile, int64_t first) IMAML_INLINE_LAMBDA {
        gather_tile<tile()>(a, map, chunk, panel, block * kTileLanes<T>, first);
      });
    }
  }
}

// Packs weights [filters, channels, taps] into panels [blocks, taps, depth, lanes], padded with
// zero lanes. `depth_stride` and `output_stride` are strides of the weights.
template <typename T>
IMAML_INLINE std::vector<T> pack(const T* weights, int64_t taps, int64_t depth,
                                 int64_t depth_stride, int64_t output_stride, int64_t outputs,
                                 Blocks blocks) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t panel = taps * depth * lanes;
  std::vector<T> panels(static_cast<std::size_t>((blocks.last - blocks.first) * panel));
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t width = std::min(lanes, outputs - block * lanes);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t t = 0; t < taps; ++t) {
        T* to = panels.data() + (block - blocks.first) * panel + (t * depth + k) * lanes;
        const T* from = weights + block * lanes * output_stride + k * depth_stride + t;
        for (int64_t lane = 0; lane < width; ++lane) to[lane] = from[lane * output_stride];
      }
  }
  return panels;
}

template <typename T>
IMAML_INLINE void forward_blocks(const ConvShape& s, const PixelMap& map, const T* x, const T* w,
                                 const T* bias, T* y, int64_t task, Blocks blocks) {
  const int64_t in = s.in_pixels() * s.channels, out = s.out_pixels() * s.filters;
  const std::vector<T> panels = pack(w + task * s.task_stride, s.taps(), s.channels, s.taps(),
                                     s.channels * s.taps(), s.filters, blocks);
  const std::vector<T> zeros(static_cast<std::size_t>(s.channels));
  gather(Gather<T>{.source = x + task * s.images * in,
                   .source_image = in,
                   .depth = s.channels,
                   .result = y + task * s.images * out,
                   .result_image = out,
                   .outputs = s.filters,
                   .blocks = blocks,
                   .zeros = zeros.data(),
                   .panels = panels.data(),
                   .bias = bias == nullptr ? nullptr : bias + task * s.filters},
         map, s.taps(), s.images);
}

template <typename T>
IMAML_INLINE void data_blocks(const ConvShape& s, const std::vector<PixelMap>& maps, const T* g,
                              const T* w, T* dx, int64_t task, Blocks blocks) {
  const int64_t in = s.in_pixels() * s.channels, out = s.out_pixels() * s.filters;
  const std::vector<T> panels = pack(w + task * s.task_stride, s.taps(), s.filters,
                                     s.channels * s.taps(), s.taps(), s.channels, blocks);
  const std::vector<T> zeros(static_cast<std::size_t>(s.filters));
  for (const PixelMap& map : maps)
    gather(Gather<T>{.source = g + task * s.images * out,
                     .source_image = out,
                     .depth = s.filters,
                     .result = dx + task * s.images * in,
                     .result_image = in,
                     .outputs = s.channels,
                     .blocks = blocks,
                     .zeros = zeros.data(),
                     .panels = panels.data(),
                     .bias = nullptr},
           map, s.taps(), s.images);
}

}  // namespace

#define IMAML_DEFINE(T)                                                                           \
  IMAML_MULTIVERSION void conv_blocks(const ConvShape& s, const PixelMap& map, const T* x,        \
                                      const T* w, const T* bias, T* y, int64_t task,              \
                                      Blocks blocks) {                                            \
    forward_blocks<T>(s, map, x, w, bias, y, task, blocks);                                       \
  }                                                                                               \
  IMAML_MULTIVERSION void conv_data_blocks(const ConvShape& s, const std::vector<PixelMap>& maps, \
                                           const T* g, const T* w, T* dx, int64_t task,           \
                                           Blocks blocks) {                                       \
    data_blocks<T>(s, maps, g, w, dx, task, blocks);                                              \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
