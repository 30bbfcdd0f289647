#include "conv.h"

#include <cstring>

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

// What the gathering tile reads: pixels of `depth` contiguous values, an image's at source[i].
template <typename T>
struct Gather {
  const T* source;   // of the task
  int64_t image;     // values between images
  int64_t depth;     // values summed over in a pixel
  const T* zeros;    // [depth]
  const T* panel;    // [all taps, depth, lanes]
  T* result;         // of the task, at the block
  int64_t result_image;
  int64_t result_pixel;
  int64_t width;     // lanes that exist
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
  const int64_t rows = images * static_cast<int64_t>(map.pixels.size());
  int64_t first = 0;
  for (; first + kTileRows <= rows; first += kTileRows) gather_tile<kTileRows>(a, map, first);
  switch (rows - first) {
    case 5: return gather_tile<5>(a, map, first);
    case 4: return gather_tile<4>(a, map, first);
    case 3: return gather_tile<3>(a, map, first);
    case 2: return gather_tile<2>(a, map, first);
    case 1: return gather_tile<1>(a, map, first);
  }
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
                                T* y, int64_t task, int64_t block) {
  const int64_t first = block * kTileLanes<T>;
  const int64_t width = std::min(kTileLanes<T>, s.filters - first);
  Scratch<T> scratch(s.taps(), s.channels);
  pack(w + task * s.weights() + first * s.channels * s.taps(), s.taps(), s.channels, s.taps(),
       s.channels * s.taps(), width, scratch.panel.data());
  const int64_t in = s.in_pixels() * s.channels, out = s.out_pixels() * s.filters;
  gather<T>({x + task * s.images * in, in, s.channels, scratch.zeros.data(), scratch.panel.data(),
             y + task * s.images * out + first, out, s.filters, width},
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
    gather<T>({g + task * s.images * out, out, s.filters, scratch.zeros.data(),
               scratch.panel.data(), dx + task * s.images * in + first, in, s.channels, width},
              map, s.images);
}

// dw of channels [channel, channel + kRows) through one tap, for the lanes of one block of filters.
template <int64_t kRows, typename T>
IMAML_INLINE void weight_tile(const ConvShape& s, const std::vector<int64_t>& seen,
                              const int64_t* sources, const T* x, const T* g, T* result) {
  Lanes<T> total[kRows] = {};
  for (int64_t n = 0; n < s.images; ++n) {
    const T* image = x + n * s.in_pixels() * s.channels;
    const T* slope = g + n * s.out_pixels() * s.filters;
    for (const int64_t pixel : seen) {
      const T* row = image + sources[pixel] * s.channels;
      const Lanes<T> lanes = Lanes<T>::load(slope + pixel * s.filters);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) total[r].add_product(row[r], lanes);
    }
  }
  for (int64_t r = 0; r < kRows; ++r) total[r].store(result + r * kTileLanes<T>);
}

template <typename T>
IMAML_INLINE void weight_block(const ConvShape& s, const PixelMap& map, const T* x, const T* g,
                               T* dw, int64_t task, int64_t block) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t first = block * lanes, width = std::min(lanes, s.filters - first);
  const T* images = x + task * s.images * s.in_pixels() * s.channels;
  const T* slopes = g + task * s.images * s.out_pixels() * s.filters + first;
  int64_t stride = s.filters;
  std::vector<T> padded;  // a copy of the block's slopes with all its lanes, where some are missing
  ConvShape inner = s;
  if (width < lanes) {
    const int64_t pixels = s.images * s.out_pixels();
    padded.resize(static_cast<std::size_t>(pixels * lanes));
    for (int64_t p = 0; p < pixels; ++p)
      std::copy_n(slopes + p * stride, width, padded.data() + p * lanes);
    slopes = padded.data();
    inner.filters = lanes;
  }
  std::vector<T> result(static_cast<std::size_t>(s.taps() * s.channels * lanes));
  std::vector<int64_t> seen;
  for (int64_t t = 0; t < s.taps(); ++t) {
    const int64_t* sources = map.sources.data() + t * s.out_pixels();
    seen.clear();
    for (int64_t pixel = 0; pixel < s.out_pixels(); ++pixel)
      if (sources[pixel] >= 0) seen.push_back(pixel);
    for (int64_t c = 0; c < s.channels;) {
      T* to = result.data() + (t * s.channels + c) * lanes;
      const int64_t rows = std::min(kTileRows, s.channels - c);
      switch (rows) {
        case 6: weight_tile<6>(inner, seen, sources, images + c, slopes, to); break;
        case 5: weight_tile<5>(inner, seen, sources, images + c, slopes, to); break;
        case 4: weight_tile<4>(inner, seen, sources, images + c, slopes, to); break;
        case 3: weight_tile<3>(inner, seen, sources, images + c, slopes, to); break;
        case 2: weight_tile<2>(inner, seen, sources, images + c, slopes, to); break;
        case 1: weight_tile<1>(inner, seen, sources, images + c, slopes, to); break;
      }
      c += rows;
    }
  }
  T* out = dw + task * s.weights() + first * s.channels * s.taps();
  for (int64_t lane = 0; lane < width; ++lane)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t t = 0; t < s.taps(); ++t)
        *out++ = result[static_cast<std::size_t>((t * s.channels + c) * lanes + lane)];
}

}  // namespace

#define IMAML_DEFINE(T)                                                                         \
  IMAML_MULTIVERSION void conv_block(const ConvShape& s, const PixelMap& map, const T* x,       \
                                     const T* w, T* y, int64_t task, int64_t block) {           \
    forward_block<T>(s, map, x, w, y, task, block);                                             \
  }                                                                                             \
  IMAML_MULTIVERSION void conv_data_block(const ConvShape& s, const std::vector<PixelMap>& maps, \
                                          const T* g, const T* w, T* dx, int64_t task,          \
                                          int64_t block) {                                      \
    data_block<T>(s, maps, g, w, dx, task, block);                                              \
  }                                                                                             \
  IMAML_MULTIVERSION void conv_weight_block(const ConvShape& s, const PixelMap& map, const T* x, \
                                            const T* g, T* dw, int64_t task, int64_t block) {   \
    weight_block<T>(s, map, x, g, dw, task, block);                                             \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
