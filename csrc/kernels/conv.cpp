#include "conv.h"

#include <cstring>
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

// How many pixels of the slopes the weight gradient takes at a time.
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

// What the gathering tile reads: pixels of `depth` contiguous values, an image's at source[i].
template <typename T>
struct Gather {
  const T* source;  // of the task
  int64_t image;    // values between images
  int64_t depth;    // values summed over in a pixel
  const T* zeros;   // [depth]
  const T* panel;   // [all taps, depth, lanes]
  const T* bias;    // [lanes], or null
  T* result;        // of the task, at the block
  int64_t result_image;
  int64_t result_pixel;
  int64_t width;  // lanes that exist
};

// Results kRows of them, from the `first`-th pixel of the batch on.
template <int64_t kRows, typename T>
IMAML_INLINE void gather_tile(const Gather<T>& a, const PixelMap& map, int64_t first) {
  const int64_t count = static_cast<int64_t>(map.pixels.size());
  const T* image[kRows];
  int64_t pixel[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    image[r] = a.source + (first + r) / count * a.image;
    pixel[r] = (first + r) % count;
  }
  Lanes<T> total[kRows] = {};
  if (a.bias != nullptr)
    for (Lanes<T>& row : total) row = Lanes<T>::load(a.bias);
  for (std::size_t t = 0; t < map.taps.size(); ++t) {
    const int64_t* sources = map.sources.data() + static_cast<int64_t>(t) * count;
    const T* row[kRows];
    bool any = false;
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t source = sources[pixel[r]];
      row[r] = source < 0 ? a.zeros : image[r] + source * a.depth;
      any |= source >= 0;
    }
    if (!any) continue;
    const T* panel = a.panel + map.taps[t] * a.depth * kTileLanes<T>;
    for (int64_t k = 0; k < a.depth; ++k) {
      const Lanes<T> lanes = Lanes<T>::load(panel + k * kTileLanes<T>);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) total[r].add_product(row[r][k], lanes);
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    T* to = a.result + (first + r) / count * a.result_image + map.pixels[pixel[r]] * a.result_pixel;
    if (a.width == kTileLanes<T>) {
      total[r].store(to);
    } else {
      T lanes[kTileLanes<T>];
      total[r].store(lanes);
      std::memcpy(to, lanes, static_cast<std::size_t>(a.width) * sizeof(T));
    }
  }
}

template <typename T>
IMAML_INLINE void gather(const Gather<T>& a, const PixelMap& map, int64_t images) {
  for_tiles(images * static_cast<int64_t>(map.pixels.size()),
            [&](auto rows, int64_t first)
                IMAML_INLINE_LAMBDA { gather_tile<rows()>(a, map, first); });
}

// [taps, depth, lanes] from weights [filters, channels, taps], lanes that do not exist being 0.
// `deep` and `wide` are the strides of what is summed over and of the lanes.
template <typename T>
IMAML_INLINE void pack(const T* weights, int64_t taps, int64_t depth, int64_t deep, int64_t wide,
                       int64_t width, T* panel) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t t = 0; t < taps; ++t) {
      T* to = panel + (t * depth + k) * kTileLanes<T>;
      const T* from = weights + k * deep + t;
      for (int64_t lane = 0; lane < width; ++lane) to[lane] = from[lane * wide];
    }
}

template <typename T>
struct Scratch {
  std::vector<T> panel, zeros;
  Scratch(int64_t taps, int64_t depth)
      : panel(static_cast<std::size_t>(taps * depth * kTileLanes<T>)),
        zeros(static_cast<std::size_t>(depth)) {}
};

template <typename T>
IMAML_INLINE void forward_block(const ConvShape& s, const PixelMap& map, const T* x, const T* w,
                                const T* bias, T* y, int64_t task, int64_t block) {
  const int64_t first = block * kTileLanes<T>;
  const int64_t width = std::min(kTileLanes<T>, s.filters - first);
  Scratch<T> scratch(s.taps(), s.channels);
  pack(w + task * s.weights() + first * s.channels * s.taps(), s.taps(), s.channels, s.taps(),
       s.channels * s.taps(), width, scratch.panel.data());
  const int64_t in = s.in_pixels() * s.channels, out = s.out_pixels() * s.filters;
  T shift[kTileLanes<T>] = {};
  if (bias != nullptr) std::copy_n(bias + task * s.filters + first, width, shift);
  gather<T>(
      {x + task * s.images * in, in, s.channels, scratch.zeros.data(), scratch.panel.data(),
       bias == nullptr ? nullptr : shift, y + task * s.images * out + first, out, s.filters, width},
      map, s.images);
}

template <typename T>
IMAML_INLINE void data_block(const ConvShape& s, const std::vector<PixelMap>& maps, const T* g,
                             const T* w, T* dx, int64_t task, int64_t block) {
  const int64_t first = block * kTileLanes<T>;
  const int64_t width = std::min(kTileLanes<T>, s.channels - first);
  Scratch<T> scratch(s.taps(), s.filters);
  pack(w + task * s.weights() + first * s.taps(), s.taps(), s.filters, s.channels * s.taps(),
       s.taps(), width, scratch.panel.data());
  const int64_t in = s.in_pixels() * s.channels, out = s.out_pixels() * s.filters;
  for (const PixelMap& map : maps)
    gather<T>(
        {g + task * s.images * out, out, s.filters, scratch.zeros.data(), scratch.panel.data(),
         nullptr, dx + task * s.images * in + first, in, s.channels, width},
        map, s.images);
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
IMAML_INLINE void weight_block(const ConvShape& s, const PixelMap& map, const T* x, const T* g,
                               T* dw, int64_t task, int64_t block) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t first = block * lanes, width = std::min(lanes, s.filters - first);
  const T* images = x + task * s.images * s.in_pixels() * s.channels;
  const T* slopes = g + task * s.images * s.out_pixels() * s.filters + first;
  const int64_t together = std::max<int64_t>(1, kChunkPixels / s.out_pixels());
  std::vector<T> packed(static_cast<std::size_t>(together * s.out_pixels() * lanes));
  std::vector<T> result(static_cast<std::size_t>(s.taps() * s.channels * lanes));
  for (int64_t n = 0; n < s.images; n += together) {
    const int64_t count = std::min(together, s.images - n);
    for (int64_t p = 0; p < count * s.out_pixels(); ++p)
      std::copy_n(slopes + (n * s.out_pixels() + p) * s.filters, width, packed.data() + p * lanes);
    const Chunk<T> chunk{s, map, count, images + n * s.in_pixels() * s.channels, packed.data()};
    if (s.channels < kTileRows) {
      for (int64_t c = 0; c < s.channels; ++c)
        for_tiles(s.taps(), [&](auto rows, int64_t tap) IMAML_INLINE_LAMBDA {
          add_taps<rows()>(chunk, tap, c, result.data() + (tap * s.channels + c) * lanes);
        });
    } else {
      for (int64_t tap = 0; tap < s.taps(); ++tap)
        for_tiles(s.channels, [&](auto rows, int64_t c) IMAML_INLINE_LAMBDA {
          add_channels<rows()>(chunk, tap, c, result.data() + (tap * s.channels + c) * lanes);
        });
    }
  }
  T* out = dw + task * s.weights() + first * s.channels * s.taps();
  for (int64_t lane = 0; lane < width; ++lane)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t t = 0; t < s.taps(); ++t)
        *out++ = result[static_cast<std::size_t>((t * s.channels + c) * lanes + lane)];
}

}  // namespace

#define IMAML_DEFINE(T)                                                                          \
  IMAML_MULTIVERSION void conv_block(const ConvShape& s, const PixelMap& map, const T* x,        \
                                     const T* w, const T* bias, T* y, int64_t task,              \
                                     int64_t block) {                                            \
    forward_block<T>(s, map, x, w, bias, y, task, block);                                        \
  }                                                                                              \
  IMAML_MULTIVERSION void conv_data_block(const ConvShape& s, const std::vector<PixelMap>& maps, \
                                          const T* g, const T* w, T* dx, int64_t task,           \
                                          int64_t block) {                                       \
    data_block<T>(s, maps, g, w, dx, task, block);                                               \
  }                                                                                              \
  IMAML_MULTIVERSION void conv_weight_block(const ConvShape& s, const PixelMap& map, const T* x, \
                                            const T* g, T* dw, int64_t task, int64_t block) {    \
    weight_block<T>(s, map, x, g, dw, task, block);                                              \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
