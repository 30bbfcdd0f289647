// The convolution and its data gradient.
#include "cpu/conv.h"

#include "cpu/conv_tiles.h"
#include "cpu/isa.h"
#include "cpu/panels.h"

namespace imaml::cpu {
namespace {

// Pixels that are computed for all blocks before the next ones.
constexpr int64_t kChunkPixels = 96;

// The operands of one task.
template <typename T>
struct Gather {
  const T* source;       // [images, pixels, depth]
  int64_t source_image;  // elements per image
  int64_t depth;
  T* result;             // [images, pixels, outputs]
  int64_t result_image;  // elements per image
  int64_t outputs;
  Blocks blocks;
  int64_t panel;    // elements per block
  const T* panels;  // [blocks, rows, lanes]
  const T* start;   // [blocks, lanes], which the sums start from
};

// The addresses of a chunk's pixels, computed once for all blocks: the divisions cost as much as a
// tap of a tile.
template <typename T>
struct Pixels {
  const T* source[kChunkPixels];
  T* result[kChunkPixels];

  IMAML_INLINE Pixels(const Gather<T>& a, const std::vector<Pixel>& pixels, int64_t begin,
                      int64_t count) {
    const int64_t size = static_cast<int64_t>(pixels.size());
    int64_t n = begin / size, p = begin % size;
    for (int64_t r = 0; r < count; ++r) {
      const Pixel& pixel = pixels[static_cast<std::size_t>(p)];
      source[r] = a.source + n * a.source_image + pixel.source * a.depth;
      result[r] = a.result + n * a.result_image + pixel.result * a.outputs;
      if (++p == size) {
        p = 0;
        ++n;
      }
    }
  }
};

// Adds some terms of kRows pixels' sums, which start from `start` or, if null, from the results.
template <int64_t kRows, typename T>
IMAML_INLINE void add_runs(const std::vector<Run>& runs, const T* panel, const T* const* source,
                           T* const* result, int64_t output, const T* start) {
  Lanes<T> total[kRows];
  for (int64_t r = 0; r < kRows; ++r)
    total[r] = Lanes<T>::load(start == nullptr ? result[r] + output : start);
  for (const Run& run : runs) {
    const T* row[kRows];
    for (int64_t r = 0; r < kRows; ++r) row[r] = source[r] + run.source;
    const T* factors = panel + run.row * kTileLanes<T>;
    for (int64_t k = 0; k < run.terms; ++k) {
      const Lanes<T> factor = Lanes<T>::load(factors + k * kTileLanes<T>);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) total[r].add_product(row[r][k], factor);
    }
  }
  for (int64_t r = 0; r < kRows; ++r) total[r].store(result[r] + output);
}

template <typename T>
IMAML_INLINE void gather(const Gather<T>& a, const PixelClass& pixels, int64_t images) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t rows = images * static_cast<int64_t>(pixels.pixels.size());
  T partial[kChunkPixels * lanes];  // the results of a block that has fewer outputs than lanes
  T* partial_rows[kChunkPixels];
  for (int64_t r = 0; r < kChunkPixels; ++r) partial_rows[r] = partial + r * lanes;
  // Where all panels stay in cache, the results of a pixel are written together.
  const int64_t panels_size = (a.blocks.last - a.blocks.first) * a.panel;
  const int64_t chunk_pixels =
      panels_size * static_cast<int64_t>(sizeof(T)) <= 16384 ? kTileRows : kChunkPixels;
  int64_t count = 0;
  for (int64_t begin = 0; begin < rows; begin += count) {
    const int64_t chunks = (rows - begin + chunk_pixels - 1) / chunk_pixels;
    count = (rows - begin) / chunks;
    const Pixels<T> chunk(a, pixels.pixels, begin, count);
    for (int64_t block = a.blocks.first; block < a.blocks.last; ++block) {
      const int64_t width = std::min(lanes, a.outputs - block * lanes);
      T* const* results = width == lanes ? chunk.result : partial_rows;
      const int64_t output = width == lanes ? block * lanes : 0;
      const T* panel = a.panels + (block - a.blocks.first) * a.panel;
      const T* start = a.start + (block - a.blocks.first) * lanes;
      for (const std::vector<Run>& runs : pixels.parts) {
        for_tiles(count, [&](auto tile, int64_t first) IMAML_INLINE_LAMBDA {
          add_runs<tile()>(runs, panel, chunk.source + first, results + first, output, start);
        });
        start = nullptr;
      }
      for (int64_t r = 0; width < lanes && r < count; ++r)
        std::copy_n(partial_rows[r], width, chunk.result[r] + block * lanes);
    }
  }
}

template <typename T>
IMAML_INLINE void forward_blocks(const ConvShape& s, const PixelMap& map, const T* x, const T* w,
                                 const T* bias, T* y, int64_t task, Blocks blocks) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t in = s.image_size(), out = s.out_pixels() * s.filters;
  const int64_t panel = map.panel_rows * lanes, patch = s.patch_size();
  const int64_t count = blocks.last - blocks.first, filter = blocks.first * lanes;
  const Scratch<int64_t> rows(patch);  // of a panel, in the order of the weights
  int64_t k = 0;
  for (int64_t c = 0; c < s.channels; ++c)
    for (const int64_t row : map.rows) rows.data()[k++] = row + c;
  const Scratch<T> panels(count * panel), start(count * lanes);
  for (int64_t block = 0; block < count; ++block)
    pack_panel({.slices = 1,
                .slice_stride = 0,
                .width = std::min(lanes, s.filters - filter - block * lanes),
                .lane_stride = patch,
                .count = patch},
               w + task * s.task_stride + (filter + block * lanes) * patch, rows.data(),
               panels.data() + block * panel);
  std::fill_n(start.data(), count * lanes, T(0));
  if (bias != nullptr)
    std::copy_n(bias + task * s.filters + filter, std::min(count * lanes, s.filters - filter),
                start.data());
  const Gather<T> operands{.source = x + task * s.images * in,
                           .source_image = in,
                           .depth = s.channels,
                           .result = y + task * s.images * out,
                           .result_image = out,
                           .outputs = s.filters,
                           .blocks = blocks,
                           .panel = panel,
                           .panels = panels.data(),
                           .start = start.data()};
  for (const PixelClass& pixels : map.classes) gather(operands, pixels, s.images);
}

template <typename T>
IMAML_INLINE void data_blocks(const ConvShape& s, const PixelMap& map, const T* g, const T* w,
                              T* dx, int64_t task, Blocks blocks) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t in = s.image_size(), out = s.out_pixels() * s.filters;
  const int64_t panel = map.panel_rows * lanes, taps = s.taps();
  const int64_t count = blocks.last - blocks.first, channel = blocks.first * lanes;
  const Scratch<T> panels(count * panel), start(count * lanes);
  for (int64_t block = 0; block < count; ++block)
    pack_panel({.slices = s.filters,
                .slice_stride = s.patch_size(),
                .width = std::min(lanes, s.channels - channel - block * lanes),
                .lane_stride = taps,
                .count = taps},
               w + task * s.task_stride + (channel + block * lanes) * taps, map.rows.data(),
               panels.data() + block * panel);
  std::fill_n(start.data(), count * lanes, T(0));
  const Gather<T> operands{.source = g + task * s.images * out,
                           .source_image = out,
                           .depth = s.filters,
                           .result = dx + task * s.images * in,
                           .result_image = in,
                           .outputs = s.channels,
                           .blocks = blocks,
                           .panel = panel,
                           .panels = panels.data(),
                           .start = start.data()};
  for (const PixelClass& pixels : map.classes) gather(operands, pixels, s.images);
}

}  // namespace

#define IMAML_DEFINE(T)                                                                         \
  IMAML_MULTIVERSION void conv_blocks(const ConvShape& s, const PixelMap& map, const T* x,      \
                                      const T* w, const T* bias, T* y, int64_t task,            \
                                      Blocks blocks) {                                          \
    forward_blocks<T>(s, map, x, w, bias, y, task, blocks);                                     \
  }                                                                                             \
  IMAML_MULTIVERSION void conv_data_blocks(const ConvShape& s, const PixelMap& map, const T* g, \
                                           const T* w, T* dx, int64_t task, Blocks blocks) {    \
    data_blocks<T>(s, map, g, w, dx, task, blocks);                                             \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
