#include "conv.h"

#include <type_traits>

#include "formulas.h"
#include "isa.h"

namespace imaml::cpu {

PixelMap output_pixels(const ConvShape& s) {
  PixelMap map;
  for (int64_t pixel = 0; pixel < s.out_pixels(); ++pixel) map.pixels.push_back(pixel);
  for (int64_t tap = 0; tap < s.taps(); ++tap) {
    map.taps.push_back(tap);
    for (const int64_t pixel : map.pixels) {
      const int64_t h = pixel / s.out_w * s.stride_h + tap / s.kernel_w - s.pad_h;
      const int64_t w = pixel % s.out_w * s.stride_w + tap % s.kernel_w - s.pad_w;
      const bool inside = 0 <= h && h < s.in_h && 0 <= w && w < s.in_w;
      map.sources.push_back(inside ? h * s.in_w + w : -1);
    }
  }
  return map;
}

std::vector<PixelMap> input_pixels(const ConvShape& s) {
  std::vector<PixelMap> maps;
  for (int64_t row = 0; row < std::min(s.stride_h, s.in_h); ++row)
    for (int64_t column = 0; column < std::min(s.stride_w, s.in_w); ++column) {
      PixelMap map;
      for (int64_t h = row; h < s.in_h; h += s.stride_h)
        for (int64_t w = column; w < s.in_w; w += s.stride_w) map.pixels.push_back(h * s.in_w + w);
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        const int64_t down = s.pad_h - tap / s.kernel_w, right = s.pad_w - tap % s.kernel_w;
        if ((row + down) % s.stride_h != 0 || (column + right) % s.stride_w != 0) continue;
        map.taps.push_back(tap);
        for (const int64_t pixel : map.pixels) {
          const int64_t h = pixel / s.in_w + down, w = pixel % s.in_w + right;
          const bool inside =
              0 <= h && h < s.out_h * s.stride_h && 0 <= w && w < s.out_w * s.stride_w;
          map.sources.push_back(inside ? h / s.stride_h * s.out_w + w / s.stride_w : -1);
        }
      }
      maps.push_back(std::move(map));
    }
  return maps;
}

namespace {

// Pixels of the result, or of the slopes, that go through all blocks together.
constexpr int64_t kChunkPixels = 96;

// Half a tile's lanes: two of these are a row of the tile, and six rows fill the sixteen vector
// registers of AVX2 but for what they are multiplied with.
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

// Calls add(std::integral_constant<int64_t, rows>, first) for tiles that cover [0, count).
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

// What the gathering tile reads and writes: pixels of `depth` contiguous values of the source, and
// of `outputs` of the result.
template <typename T>
struct Gather {
  const T* source;  // of the task
  int64_t image;    // values between its images
  int64_t depth;    // values summed over in a pixel
  T* result;        // of the task
  int64_t result_image;
  int64_t outputs;
  Blocks blocks;
  const T* zeros;   // [depth]
  const T* panels;  // [blocks, all taps, depth, lanes]
  const T* bias;    // [outputs] of the task, or null
};

// Where the pixels of a chunk are: divisions cost as much as a tile's tap, so they are made once
// for all blocks.
template <typename T>
struct Pixels {
  const T* image[kChunkPixels];
  int64_t pixel[kChunkPixels];  // in the map
  T* result[kChunkPixels];

  IMAML_INLINE Pixels(const Gather<T>& a, const PixelMap& map, int64_t begin, int64_t count) {
    const int64_t pixels = static_cast<int64_t>(map.pixels.size());
    int64_t n = begin / pixels, own = begin % pixels;
    for (int64_t r = 0; r < count; ++r) {
      image[r] = a.source + n * a.image;
      pixel[r] = own;
      result[r] =
          a.result + n * a.result_image + map.pixels[static_cast<std::size_t>(own)] * a.outputs;
      if (++own == pixels) {
        own = 0;
        ++n;
      }
    }
  }
};

// kRows pixels of a chunk from the `first`-th on, in the block that begins at `output`.
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

// [blocks, taps, depth, lanes] from weights [filters, channels, taps], lanes that do not exist
// being 0. `deep` and `wide` are the strides of what is summed over and of the outputs.
template <typename T>
IMAML_INLINE std::vector<T> pack(const T* weights, int64_t taps, int64_t depth, int64_t deep,
                                 int64_t wide, int64_t outputs, Blocks blocks) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t panel = taps * depth * lanes;
  std::vector<T> panels(static_cast<std::size_t>((blocks.last - blocks.first) * panel));
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t width = std::min(lanes, outputs - block * lanes);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t t = 0; t < taps; ++t) {
        T* to = panels.data() + (block - blocks.first) * panel + (t * depth + k) * lanes;
        const T* from = weights + block * lanes * wide + k * deep + t;
        for (int64_t lane = 0; lane < width; ++lane) to[lane] = from[lane * wide];
      }
  }
  return panels;
}

template <typename T>
IMAML_INLINE void forward_blocks(const ConvShape& s, const PixelMap& map, const T* x, const T* w,
                                 const T* bias, T* y, int64_t task, Blocks blocks) {
  const int64_t in = s.in_pixels() * s.channels, out = s.out_pixels() * s.filters;
  const std::vector<T> panels = pack(w + task * s.task_weights, s.taps(), s.channels, s.taps(),
                                     s.channels * s.taps(), s.filters, blocks);
  const std::vector<T> zeros(static_cast<std::size_t>(s.channels));
  gather(Gather<T>{.source = x + task * s.images * in,
                   .image = in,
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
  const std::vector<T> panels = pack(w + task * s.task_weights, s.taps(), s.filters,
                                     s.channels * s.taps(), s.taps(), s.channels, blocks);
  const std::vector<T> zeros(static_cast<std::size_t>(s.filters));
  for (const PixelMap& map : maps)
    gather(Gather<T>{.source = g + task * s.images * out,
                     .image = out,
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

// Some images of a task, small enough for their pixels to stay in cache while every weight takes
// its share of them.
template <typename T>
struct Chunk {
  const ConvShape& shape;
  const PixelMap& map;
  int64_t images;
  const T* x;       // [images, in_pixels, channels]
  const T* slopes;  // [images, out_pixels, lanes]: of one block of filters
};

// Adds the chunk's share of dw to kRows weights of `tap`, of the channels from `channel` on.
template <int64_t kRows, typename T>
IMAML_INLINE void add_channels(const Chunk<T>& a, int64_t tap, int64_t channel, T* result) {
  const ConvShape& s = a.shape;
  const int64_t* sources = a.map.sources.data() + tap * s.out_pixels();
  Lanes<T> total[kRows];
  for (int64_t r = 0; r < kRows; ++r) total[r] = Lanes<T>::load(result + r * kTileLanes<T>);
  const T* slope = a.slopes;
  for (int64_t n = 0; n < a.images; ++n) {
    const T* image = a.x + n * s.in_pixels() * s.channels + channel;
    for (int64_t pixel = 0; pixel < s.out_pixels(); ++pixel, slope += kTileLanes<T>) {
      if (sources[pixel] < 0) continue;
      const T* row = image + sources[pixel] * s.channels;
      const Lanes<T> lanes = Lanes<T>::load(slope);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) total[r].add_product(row[r], lanes);
    }
  }
  for (int64_t r = 0; r < kRows; ++r) total[r].store(result + r * kTileLanes<T>);
}

// The same for kRows taps from `tap` on, of one channel: where channels are too few to fill a tile.
template <int64_t kRows, typename T>
IMAML_INLINE void add_taps(const Chunk<T>& a, int64_t tap, int64_t channel, T* result) {
  const ConvShape& s = a.shape;
  const int64_t* sources = a.map.sources.data() + tap * s.out_pixels();
  const int64_t apart = s.channels * kTileLanes<T>;
  Lanes<T> total[kRows];
  for (int64_t r = 0; r < kRows; ++r) total[r] = Lanes<T>::load(result + r * apart);
  const T* slope = a.slopes;
  for (int64_t n = 0; n < a.images; ++n) {
    const T* image = a.x + n * s.in_pixels() * s.channels + channel;
    for (int64_t pixel = 0; pixel < s.out_pixels(); ++pixel, slope += kTileLanes<T>) {
      const Lanes<T> lanes = Lanes<T>::load(slope);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t source = sources[r * s.out_pixels() + pixel];
        total[r].add_product(source < 0 ? T(0) : image[source * s.channels], lanes);
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) total[r].store(result + r * apart);
}

template <typename T>
IMAML_INLINE void weight_blocks(const ConvShape& s, const PixelMap& map, const T* x, const T* g,
                                T* dw, int64_t task, Blocks blocks) {
  constexpr int64_t lanes = kTileLanes<T>;
  const T* images = x + task * s.images * s.in_pixels() * s.channels;
  const T* slopes = g + task * s.images * s.out_pixels() * s.filters;
  const int64_t together = std::max<int64_t>(1, kChunkPixels / s.out_pixels());
  const int64_t share = s.taps() * s.channels * lanes;  // of a block
  std::vector<T> packed(static_cast<std::size_t>(together * s.out_pixels() * lanes));
  std::vector<T> results(static_cast<std::size_t>((blocks.last - blocks.first) * share));
  for (int64_t n = 0; n < s.images; n += together) {
    const int64_t count = std::min(together, s.images - n);
    const T* pixels = slopes + n * s.out_pixels() * s.filters;
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const int64_t width = std::min(lanes, s.filters - block * lanes);
      for (int64_t p = 0; p < count * s.out_pixels(); ++p)
        std::copy_n(pixels + p * s.filters + block * lanes, width, packed.data() + p * lanes);
      const Chunk<T> chunk{s, map, count, images + n * s.in_pixels() * s.channels, packed.data()};
      T* result = results.data() + (block - blocks.first) * share;
      if (s.channels < kTileRows) {
        for (int64_t c = 0; c < s.channels; ++c)
          for_tiles(s.taps(), [&](auto rows, int64_t tap) IMAML_INLINE_LAMBDA {
            add_taps<rows()>(chunk, tap, c, result + (tap * s.channels + c) * lanes);
          });
      } else {
        for (int64_t tap = 0; tap < s.taps(); ++tap)
          for_tiles(s.channels, [&](auto rows, int64_t c) IMAML_INLINE_LAMBDA {
            add_channels<rows()>(chunk, tap, c, result + (tap * s.channels + c) * lanes);
          });
      }
    }
  }
  const int64_t end = std::min(blocks.last * lanes, s.filters);
  for (int64_t o = blocks.first * lanes; o < end; ++o) {
    const T* result = results.data() + (o / lanes - blocks.first) * share + o % lanes;
    T* out = dw + task * s.weights() + o * s.channels * s.taps();
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t t = 0; t < s.taps(); ++t) *out++ = result[(t * s.channels + c) * lanes];
  }
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
  }                                                                                               \
  IMAML_MULTIVERSION void conv_weight_blocks(const ConvShape& s, const PixelMap& map, const T* x, \
                                             const T* g, T* dw, int64_t task, Blocks blocks) {    \
    weight_blocks<T>(s, map, x, g, dw, task, blocks);                                             \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
