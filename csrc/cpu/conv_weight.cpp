// The weight gradient of a convolution.
#include "cpu/conv.h"
#include "cpu/conv_tiles.h"
#include "cpu/isa.h"

namespace imaml::cpu {
namespace {

// Some images of a task, few enough that their pixels stay in cache while all weights accumulate
// their terms.
template <typename T>
struct Chunk {
  const ConvShape& shape;
  const PixelMap& map;
  int64_t images;
  const T* x;  // [images, in_pixels, channels]
  const T* g;  // [images, out_pixels, lanes]: of one block of filters
};

// Adds the chunk's terms to the weights of `tap` and of kRows channels from `channel` on.
template <int64_t kRows, typename T>
IMAML_INLINE void add_channels(const Chunk<T>& a, int64_t tap, int64_t channel, T* result) {
  const ConvShape& s = a.shape;
  const int64_t* sources = a.map.sources.data() + tap * s.out_pixels();
  Lanes<T> total[kRows];
  for (int64_t r = 0; r < kRows; ++r) total[r] = Lanes<T>::load(result + r * kTileLanes<T>);
  const T* g = a.g;
  for (int64_t n = 0; n < a.images; ++n) {
    const T* image = a.x + n * s.in_pixels() * s.channels + channel;
    for (int64_t pixel = 0; pixel < s.out_pixels(); ++pixel, g += kTileLanes<T>) {
      if (sources[pixel] < 0) continue;
      const T* row = image + sources[pixel] * s.channels;
      const Lanes<T> lanes = Lanes<T>::load(g);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) total[r].add_product(row[r], lanes);
    }
  }
  for (int64_t r = 0; r < kRows; ++r) total[r].store(result + r * kTileLanes<T>);
}

// The same for kRows taps from `tap` on and one channel, where the channels do not fill a tile.
template <int64_t kRows, typename T>
IMAML_INLINE void add_taps(const Chunk<T>& a, int64_t tap, int64_t channel, T* result) {
  const ConvShape& s = a.shape;
  const int64_t* sources = a.map.sources.data() + tap * s.out_pixels();
  const int64_t tap_stride = s.channels * kTileLanes<T>;
  Lanes<T> total[kRows];
  for (int64_t r = 0; r < kRows; ++r) total[r] = Lanes<T>::load(result + r * tap_stride);
  const T* g = a.g;
  for (int64_t n = 0; n < a.images; ++n) {
    const T* image = a.x + n * s.in_pixels() * s.channels + channel;
    for (int64_t pixel = 0; pixel < s.out_pixels(); ++pixel, g += kTileLanes<T>) {
      const Lanes<T> lanes = Lanes<T>::load(g);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t source = sources[r * s.out_pixels() + pixel];
        total[r].add_product(source < 0 ? T(0) : image[source * s.channels], lanes);
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) total[r].store(result + r * tap_stride);
}

template <typename T>
IMAML_INLINE void weight_blocks(const ConvShape& s, const PixelMap& map, const T* x, const T* g,
                                T* dw, int64_t task, Blocks blocks) {
  constexpr int64_t lanes = kTileLanes<T>;
  const T* images = x + task * s.images * s.in_pixels() * s.channels;
  const T* grads = g + task * s.images * s.out_pixels() * s.filters;
  const int64_t chunk_images = std::max<int64_t>(1, kChunkPixels / s.out_pixels());
  const int64_t block_size = s.taps() * s.channels * lanes;
  std::vector<T> packed(static_cast<std::size_t>(chunk_images * s.out_pixels() * lanes));
  std::vector<T> results(static_cast<std::size_t>((blocks.last - blocks.first) * block_size));
  for (int64_t n = 0; n < s.images; n += chunk_images) {
    const int64_t count = std::min(chunk_images, s.images - n);
    const T* pixels = grads + n * s.out_pixels() * s.filters;
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const int64_t width = std::min(lanes, s.filters - block * lanes);
      for (int64_t p = 0; p < count * s.out_pixels(); ++p)
        std::copy_n(pixels + p * s.filters + block * lanes, width, packed.data() + p * lanes);
      const Chunk<T> chunk{s, map, count, images + n * s.in_pixels() * s.channels, packed.data()};
      T* result = results.data() + (block - blocks.first) * block_size;
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
    const T* result = results.data() + (o / lanes - blocks.first) * block_size + o % lanes;
    T* out = dw + task * s.task_stride + o * s.channels * s.taps();
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t t = 0; t < s.taps(); ++t) *out++ = result[(t * s.channels + c) * lanes];
  }
}

}  // namespace

#define IMAML_DEFINE(T)                                                                           \
  IMAML_MULTIVERSION void conv_weight_blocks(const ConvShape& s, const PixelMap& map, const T* x, \
                                             const T* g, T* dw, int64_t task, Blocks blocks) {    \
    weight_blocks<T>(s, map, x, g, dw, task, blocks);                                             \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
