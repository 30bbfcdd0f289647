// The weight gradient of a convolution.
#include "cpu/conv.h"
#include "cpu/conv_tiles.h"
#include "cpu/isa.h"
#include "cpu/panels.h"

namespace imaml::cpu {
namespace {

// Adds the terms of kRows weights of a block of filters. `x` are rows of lanes, one per term, if
// packed, and images otherwise. `result` is [weights of a filter, lanes].
template <int64_t kRows, bool kPacked, typename T>
IMAML_INLINE void add_terms(const T* x, const T* g, const WeightTerm* term, const WeightTerm* end,
                            const int64_t* sources, const int64_t* weights, bool first, T* result) {
  Lanes<T> total[kRows] = {};
  int64_t source[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    source[r] = kPacked ? r : sources[r];
    if (!first) total[r] = Lanes<T>::load(result + weights[r] * kTileLanes<T>);
  }
  for (; term != end; ++term) {
    const T* from = kPacked ? x : x + term->x;
    const Lanes<T> lanes = Lanes<T>::load(g + term->g);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) total[r].add_product(from[source[r]], lanes);
    if (kPacked) x += kTileLanes<T>;
  }
  for (int64_t r = 0; r < kRows; ++r) total[r].store(result + weights[r] * kTileLanes<T>);
}

template <typename T>
IMAML_INLINE void copy_lanes(const T* from, int64_t width, T* to) {
  if (width == kTileLanes<T>)
    Lanes<T>::load(from).store(to);
  else
    std::copy_n(from, width, to);
}

template <typename T>
IMAML_INLINE void weight_blocks(const ConvShape& s, const WeightPlan& plan, const T* x, const T* g,
                                T* dw, int64_t task, Blocks blocks) {
  constexpr int64_t lanes = kTileLanes<T>;
  const T* images = x + task * s.images * s.image_size();
  const T* grads = g + task * s.images * s.out_pixels() * s.filters;
  const int64_t block_size = s.patch_size() * lanes, count = blocks.last - blocks.first;
  const int64_t packed_size = plan.chunk_images * s.out_pixels() * lanes;
  const Scratch<T> packed(count * packed_size), packed_x(plan.chunk_pixels * lanes);
  const Scratch<T> results(count * block_size);
  if (plan.by_class) std::fill_n(results.data(), count * block_size, T(0));
  for (int64_t n = 0; n < s.images; n += plan.chunk_images) {
    const int64_t pixels = std::min(plan.chunk_images, s.images - n) * s.out_pixels();
    for (int64_t begin = 0; begin < pixels; begin += plan.chunk_pixels) {
      const int64_t end = std::min(begin + plan.chunk_pixels, pixels);
      const bool first = n == 0 && begin == 0;
      for (int64_t p = begin; p < end; ++p)
        for (int64_t block = 0; block < count; ++block) {
          const int64_t o = (block + blocks.first) * lanes;
          copy_lanes(grads + (n * s.out_pixels() + p) * s.filters + o,
                     std::min(lanes, s.filters - o),
                     packed.data() + block * packed_size + p * lanes);
        }
      const T* xs = images + n * s.image_size();
      for (int64_t i0 = 0; i0 < (plan.by_class ? 1 : s.channels); i0 += lanes)
      for (const WeightJob& job : plan.jobs) {
        const auto is_before = [](const WeightTerm& a, int64_t row) { return a.g < row; };
        const WeightTerm* terms = job.terms.data();
        const WeightTerm* last = terms + job.terms.size();
        const WeightTerm* from = std::lower_bound(terms, last, begin * lanes, is_before);
        const WeightTerm* to = std::lower_bound(from, last, end * lanes, is_before);
        const int64_t size = static_cast<int64_t>(job.weights.size());
        if (plan.by_class) {
          for (int64_t block = 0; block < count; ++block)
            for_tiles(size, [&](auto rows, int64_t i) IMAML_INLINE_LAMBDA {
              add_terms<rows(), false>(xs, packed.data() + block * packed_size, from, to,
                                       job.sources.data() + i, job.weights.data() + i, false,
                                       results.data() + block * block_size);
            });
        } else {
            const int64_t width = std::min(lanes, size - i0);
            T* row = packed_x.data();
            for (const WeightTerm* t = from; t != to; ++t, row += lanes)
              copy_lanes(xs + t->x + i0, width, row);
            for (int64_t block = 0; block < count; ++block)
              for_tiles(width, [&](auto rows, int64_t i) IMAML_INLINE_LAMBDA {
                add_terms<rows(), true>(packed_x.data() + i, packed.data() + block * packed_size,
                                        from, to, nullptr, job.weights.data() + i0 + i, first,
                                        results.data() + block * block_size);
              });
        }
      }
    }
  }
  for (int64_t block = 0; block < count; ++block) {
    const int64_t o = (block + blocks.first) * lanes;
    unpack_panel(results.data() + block * block_size, std::min(lanes, s.filters - o),
                 s.patch_size(), dw + task * s.task_stride + o * s.patch_size());
  }
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
