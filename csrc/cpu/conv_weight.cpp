// The weight gradient of a convolution.
#include "cpu/conv.h"
#include "cpu/conv_tiles.h"
#include "cpu/isa.h"
#include "cpu/panels.h"

namespace imaml::cpu {
namespace {

// A chunk of a task's pixels, for some blocks of filters.
template <typename T>
struct Chunk {
  int64_t begin, end;  // output pixels
  int64_t blocks;
  const T* x;
  const T* g;       // [blocks, output pixels, lanes]
  int64_t g_block;  // elements per block
  T* result;        // [blocks, weights of a filter, lanes]
  int64_t result_block;
  bool first;  // the results are not initialised
};

// Adds terms to kRows weights of a block; kAdjacent: those of adjacent channels, from x on.
template <int64_t kRows, bool kAdjacent, typename T>
IMAML_INLINE void add_terms(const WeightTerm* term, const WeightTerm* end, const T* x, const T* g,
                            const int64_t* sources, const int64_t* weights, bool first, T* result) {
  Lanes<T> total[kRows] = {};
  int64_t source[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    source[r] = kAdjacent ? r : sources[r];
    if (!first) total[r] = Lanes<T>::load(result + weights[r] * kTileLanes<T>);
  }
  for (; term != end; ++term) {
    const T* from = x + term->x;
    const Lanes<T> lanes = Lanes<T>::load(g + term->g);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) total[r].add_product(from[source[r]], lanes);
  }
  for (int64_t r = 0; r < kRows; ++r) total[r].store(result + weights[r] * kTileLanes<T>);
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
                                   sources + i, weights + i, a.first,
                                   a.result + block * a.result_block);
    });
}

// Copies rows of `depth` values to [groups, slots, lanes], row r to slot(r).
template <typename T, typename Slot>
IMAML_INLINE void pack_rows(const T* from, int64_t rows, int64_t stride, int64_t depth, T* to,
                            int64_t group_size, const Slot& slot) {
  constexpr int64_t lanes = kTileLanes<T>;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = from + r * stride;
    T* out = to + slot(r) * lanes;
    int64_t k = 0;
    for (; k + lanes <= depth; k += lanes, out += group_size) Lanes<T>::load(row + k).store(out);
    std::copy_n(row + k, depth - k, out);
  }
}

template <typename T>
IMAML_INLINE void weight_blocks(const ConvShape& s, const WeightPlan& plan, const T* x, const T* g,
                                T* dw, int64_t task, Blocks blocks) {
  constexpr int64_t lanes = kTileLanes<T>;
  const int64_t count = blocks.last - blocks.first, patch = s.patch_size();
  const int64_t in = s.in_pixels(), out = s.out_pixels();
  const int64_t filter = blocks.first * lanes;
  const int64_t filters = std::min(blocks.last * lanes, s.filters) - filter;
  const bool by_tap = !plan.slots.empty();
  const int64_t groups = by_tap ? tile_blocks<T>(s.channels) : 1;
  const int64_t x_group = by_tap ? plan.chunk_images * in * lanes : 0;
  const int64_t g_block = plan.chunk_images * out * lanes;
  const Scratch<T> packed_x(groups * x_group), packed_g(count * g_block);
  const Scratch<T> result(count * patch * lanes);
  if (!by_tap) std::fill_n(result.data(), count * patch * lanes, T(0));
  for (int64_t n = 0; n < s.images; n += plan.chunk_images) {
    const int64_t images = std::min(plan.chunk_images, s.images - n);
    const T* from_x = x + (task * s.images + n) * s.image_size();
    for (int64_t i = 0; by_tap && i < images; ++i)
      pack_rows(from_x + i * s.image_size(), in, s.channels, s.channels,
                packed_x.data() + i * in * lanes, x_group, [&](int64_t pixel) IMAML_INLINE_LAMBDA {
                  return plan.slots[static_cast<std::size_t>(pixel)];
                });
    pack_rows(g + (task * s.images + n) * out * s.filters + filter, images * out, s.filters,
              filters, packed_g.data(), g_block,
              [](int64_t pixel) IMAML_INLINE_LAMBDA { return pixel; });
    for (int64_t begin = 0; begin < images * out; begin += plan.chunk_pixels) {
      Chunk<T> chunk{.begin = begin,
                     .end = std::min(begin + plan.chunk_pixels, images * out),
                     .blocks = count,
                     .x = from_x,
                     .g = packed_g.data(),
                     .g_block = g_block,
                     .result = result.data(),
                     .result_block = patch * lanes,
                     .first = by_tap && n == 0 && begin == 0};
      if (!by_tap)
        for (const WeightJob& job : plan.jobs)
          add_job<false>(chunk, job, 0, static_cast<int64_t>(job.weights.size()));
      for (int64_t group = 0; by_tap && group < groups; ++group) {
        chunk.x = packed_x.data() + group * x_group;
        for (const WeightJob& job : plan.jobs)
          add_job<true>(chunk, job, group * lanes, std::min(lanes, s.channels - group * lanes));
      }
    }
  }
  for (int64_t block = 0; block < count; ++block)
    unpack_panel(result.data() + block * patch * lanes, std::min(lanes, filters - block * lanes),
                 patch, dw + task * s.task_stride + (filter + block * lanes) * patch);
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
