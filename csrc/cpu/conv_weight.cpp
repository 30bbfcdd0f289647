// The weight gradient of a convolution.
#include "cpu/conv.h"
#include "cpu/conv_tiles.h"
#include "cpu/isa.h"
#include "cpu/transpose.h"

namespace imaml::cpu {
namespace {

// Adds the terms of kRows weights of a block of filters. `result` is [weights of a filter, lanes].
template <int64_t kRows, typename T>
IMAML_INLINE void add_terms(const T* x, const T* g, const WeightTerm* term, const WeightTerm* end,
                            const int64_t* sources, const int64_t* weights, bool first, T* result) {
  Lanes<T> total[kRows] = {};
  int64_t source[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    source[r] = sources[r];
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

template <typename T>
IMAML_INLINE void weight_blocks(const ConvShape& s, const WeightPlan& plan, const T* x, const T* g,
                                T* dw, int64_t task, Blocks blocks) {
  constexpr int64_t lanes = kTileLanes<T>;
  const T* images = x + task * s.images * s.image_size();
  const T* grads = g + task * s.images * s.out_pixels() * s.filters;
  const int64_t block_size = s.patch_size() * lanes;
  const Scratch<T> packed(plan.chunk_images * s.out_pixels() * lanes);
  const Scratch<T> results((blocks.last - blocks.first) * block_size);
  if (plan.by_class)
    std::fill_n(results.data(), (blocks.last - blocks.first) * block_size, T(0));
  for (int64_t n = 0; n < s.images; n += plan.chunk_images) {
    const int64_t pixels = std::min(plan.chunk_images, s.images - n) * s.out_pixels();
    for (int64_t begin = 0; begin < pixels; begin += plan.chunk_pixels) {
      const int64_t end = std::min(begin + plan.chunk_pixels, pixels);
      for (int64_t block = blocks.first; block < blocks.last; ++block) {
        const int64_t width = std::min(lanes, s.filters - block * lanes);
        const T* from = grads + n * s.out_pixels() * s.filters + block * lanes;
        for (int64_t p = begin; p < end; ++p)
          std::copy_n(from + p * s.filters, width, packed.data() + p * lanes);
        T* result = results.data() + (block - blocks.first) * block_size;
        for (const WeightJob& job : plan.jobs) {
          const auto is_before = [](const WeightTerm& a, int64_t row) { return a.g < row; };
          const WeightTerm* terms = job.terms.data();
          const WeightTerm* last = terms + job.terms.size();
          const WeightTerm* from = std::lower_bound(terms, last, begin * lanes, is_before);
          const WeightTerm* to = std::lower_bound(from, last, end * lanes, is_before);
          for_tiles(static_cast<int64_t>(job.weights.size()),
                    [&](auto rows, int64_t i) IMAML_INLINE_LAMBDA {
                      add_terms<rows()>(images + n * s.image_size(), packed.data(), from, to,
                                        job.sources.data() + i, job.weights.data() + i,
                                        !plan.by_class && n == 0 && begin == 0, result);
                    });
        }
      }
    }
  }
  for (int64_t block = blocks.first; block < blocks.last; ++block)
    transpose_from_lanes(results.data() + (block - blocks.first) * block_size,
                         std::min(lanes, s.filters - block * lanes), s.patch_size(),
                         dw + task * s.task_stride + block * lanes * s.patch_size(),
                         s.patch_size());
}

}  // namespace

#define IMAML_DEFINE(T)                                                                         \
  IMAML_MULTIVERSION void conv_weight_blocks(const ConvShape& s, const WeightPlan& plan,        \
                                             const T* x, const T* g, T* dw, int64_t task,       \
                                             Blocks blocks) {                                   \
    weight_blocks<T>(s, plan, x, g, dw, task, blocks);                                          \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
