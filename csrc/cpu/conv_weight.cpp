// The weight gradient of a convolution.
#include "cpu/conv.h"
#include "cpu/conv_tiles.h"
#include "cpu/isa.h"
#include "cpu/panels.h"

namespace imaml::cpu {
namespace {

// Output pixels of a chunk of a task's images.
template <typename T>
struct Chunk {
  int64_t begin, end;
  bool first;  // the results are not initialised
  const T* x;
  const T* g;                     // [blocks, output pixels, lanes]
  T* result;                      // [blocks, weights, lanes]
  int64_t blocks;                 // of filters
  int64_t g_block, result_block;  // elements per block
  int64_t first_weight;           // of a filter's weights
};

// Adds terms to kRows weights of a block; kAdjacent: those of adjacent channels, from x on.
template <int64_t kRows, bool kAdjacent, typename T>
IMAML_INLINE void add_terms(const WeightTerm* term, const WeightTerm* end, const T* x, const T* g,
                            const int64_t* sources, const int64_t* weights, int64_t first_weight,
                            bool first, T* result) {
  Lanes<T> total[kRows] = {};
  int64_t source[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    source[r] = kAdjacent ? r : sources[r];
    if (!first) total[r] = Lanes<T>::load(result + (weights[r] - first_weight) * kTileLanes<T>);
  }
  for (; term != end; ++term) {
    const T* from = x + term->x;
    const Lanes<T> lanes = Lanes<T>::load(g + term->g);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) total[r].add_product(from[source[r]], lanes);
  }
  for (int64_t r = 0; r < kRows; ++r)
    total[r].store(result + (weights[r] - first_weight) * kTileLanes<T>);
}

// Adds the chunk's terms of a job to `count` of its weights, from index `begin` on.
template <bool kAdjacent, typename T>
IMAML_INLINE void add_job(const Chunk<T>& a, const WeightJob& job, int64_t begin, int64_t count) {
  const auto first_from = [&](int64_t pixel) {
    return std::lower_bound(job.terms.data(), job.terms.data() + job.terms.size(),
                            pixel * kTileLanes<T>,
                            [](const WeightTerm& term, int64_t g) { return term.g < g; });
  };
  const WeightTerm *term = first_from(a.begin), *end = first_from(a.end);
  const int64_t *sources = job.sources.data() + begin, *weights = job.weights.data() + begin;
  for (int64_t block = 0; block < a.blocks; ++block)
    for_tiles(count, [&](auto rows, int64_t i) IMAML_INLINE_LAMBDA {
      add_terms<rows(), kAdjacent>(term, end, kAdjacent ? a.x + i : a.x, a.g + block * a.g_block,
                                   sources + i, weights + i, a.first_weight, a.first,
                                   a.result + block * a.result_block);
    });
}

// Copies rows of `depth` values to [groups, slots, lanes], row r to slot(r). Lanes past the last
// value are 0.
template <typename T, typename Slot>
IMAML_INLINE void pack_rows(const T* from, int64_t rows, int64_t stride, int64_t depth, T* to,
                            int64_t group_size, const Slot& slot) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t whole = depth / lanes, rest = depth % lanes;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = from + r * stride;
    T* out = to + slot(r) * lanes;
    for (int64_t group = 0; group < whole; ++group)
      Lanes<T>::load(row + group * lanes).store(out + group * group_size);
    if (rest > 0) {
      std::copy_n(row + whole * lanes, rest, out + whole * group_size);
      std::fill_n(out + whole * group_size + rest, lanes - rest, T(0));
    }
  }
}

// Calls pack(n, images) for each chunk of images, from image n on, and add(begin, end) for some of
// its output pixels at a time.
template <typename Pack, typename Add>
IMAML_INLINE void for_chunks(const ConvShape& s, const WeightPlan& plan, const Pack& pack,
                             const Add& add) {
  for (int64_t n = 0; n < s.images; n += plan.chunk_images) {
    const int64_t images = std::min(plan.chunk_images, s.images - n);
    const int64_t pixels = images * s.out_pixels();
    pack(n, images);
    for (int64_t begin = 0; begin < pixels; begin += plan.chunk_pixels)
      add(begin, std::min(begin + plan.chunk_pixels, pixels));
  }
}

// The weights of all channels and some blocks of filters.
template <typename T>
IMAML_INLINE void weights_by_class(const ConvShape& s, const WeightPlan& plan, const T* x,
                                   const T* g, T* dw, Blocks blocks) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t count = blocks.last - blocks.first, patch = s.patch_size();
  const int64_t filter = blocks.first * lanes;
  const int64_t filters = std::min(blocks.last * lanes, s.filters) - filter;
  const int64_t g_block = plan.chunk_images * s.out_pixels() * lanes;
  const Scratch<T> packed_g(count * g_block), result(count * patch * lanes);
  std::fill_n(result.data(), count * patch * lanes, T(0));
  Chunk<T> chunk{.begin = 0,
                 .end = 0,
                 .first = false,
                 .x = nullptr,
                 .g = packed_g.data(),
                 .result = result.data(),
                 .blocks = count,
                 .g_block = g_block,
                 .result_block = patch * lanes,
                 .first_weight = 0};
  for_chunks(
      s, plan,
      [&](int64_t n, int64_t images) IMAML_INLINE_LAMBDA {
        chunk.x = x + n * s.image_size();
        pack_rows(g + n * s.out_pixels() * s.filters + filter, images * s.out_pixels(), s.filters,
                  filters, packed_g.data(), g_block,
                  [](int64_t pixel) IMAML_INLINE_LAMBDA { return pixel; });
      },
      [&](int64_t begin, int64_t end) IMAML_INLINE_LAMBDA {
        chunk.begin = begin;
        chunk.end = end;
        for (const WeightJob& job : plan.jobs)
          add_job<false>(chunk, job, 0, static_cast<int64_t>(job.weights.size()));
      });
  for (int64_t block = 0; block < count; ++block)
    unpack_panel(result.data() + block * patch * lanes, std::min(lanes, filters - block * lanes),
                 patch, dw + (filter + block * lanes) * patch, patch);
}

// The weights of some groups of channels and all filters.
template <typename T>
IMAML_INLINE void weights_by_tap(const ConvShape& s, const WeightPlan& plan, const T* x, const T* g,
                                 T* dw, Blocks groups) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t blocks = tile_blocks<T>(s.filters), channel = groups.first * lanes;
  const int64_t channels = std::min(groups.last * lanes, s.channels) - channel;
  const int64_t weights = channels * s.taps(), in = s.in_pixels();
  const int64_t g_block = plan.chunk_images * s.out_pixels() * lanes;
  const int64_t x_group = plan.chunk_images * in * lanes;
  const Scratch<T> packed_g(blocks * g_block), packed_x((groups.last - groups.first) * x_group);
  const Scratch<T> result(blocks * weights * lanes);
  Chunk<T> chunk{.begin = 0,
                 .end = 0,
                 .first = true,
                 .x = nullptr,
                 .g = packed_g.data(),
                 .result = result.data(),
                 .blocks = blocks,
                 .g_block = g_block,
                 .result_block = weights * lanes,
                 .first_weight = channel * s.taps()};
  for_chunks(
      s, plan,
      [&](int64_t n, int64_t images) IMAML_INLINE_LAMBDA {
        for (int64_t i = 0; i < images; ++i)
          pack_rows(x + (n + i) * s.image_size() + channel, in, s.channels, channels,
                    packed_x.data() + i * in * lanes, x_group,
                    [&](int64_t pixel) IMAML_INLINE_LAMBDA {
                      return plan.slots[static_cast<std::size_t>(pixel)];
                    });
        pack_rows(g + n * s.out_pixels() * s.filters, images * s.out_pixels(), s.filters, s.filters,
                  packed_g.data(), g_block,
                  [](int64_t pixel) IMAML_INLINE_LAMBDA { return pixel; });
      },
      [&](int64_t begin, int64_t end) IMAML_INLINE_LAMBDA {
        chunk.begin = begin;
        chunk.end = end;
        for (int64_t c = 0; c < channels; c += lanes) {
          chunk.x = packed_x.data() + c / lanes * x_group;
          for (const WeightJob& job : plan.jobs)
            add_job<true>(chunk, job, channel + c, std::min(lanes, channels - c));
        }
        chunk.first = false;
      });
  for (int64_t block = 0; block < blocks; ++block)
    unpack_panel(result.data() + block * weights * lanes,
                 std::min(lanes, s.filters - block * lanes), weights,
                 dw + block * lanes * s.patch_size() + chunk.first_weight, s.patch_size());
}

template <typename T>
IMAML_INLINE void weight_blocks(const ConvShape& s, const WeightPlan& plan, const T* x, const T* g,
                                T* dw, int64_t task, Blocks blocks) {
  x += task * s.images * s.image_size();
  g += task * s.images * s.out_pixels() * s.filters;
  dw += task * s.task_stride;
  if (plan.slots.empty())
    weights_by_class(s, plan, x, g, dw, blocks);
  else
    weights_by_tap(s, plan, x, g, dw, blocks);
}

}  // namespace

#define IMAML_DEFINE(T)                                                                   \
  IMAML_MULTIVERSION void conv_weight_blocks(const ConvShape& s, const WeightPlan& plan,  \
                                             const T* x, const T* g, T* dw, int64_t task, \
                                             Blocks blocks) {                             \
    weight_blocks<T>(s, plan, x, g, dw, task, blocks);                                    \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
