#include "batch_norm.h"

#include <cmath>
#include <vector>

#include "formulas.h"
#include "isa.h"

namespace imaml::cpu {
namespace {

// kSums sums for each channel of a block.
template <int kSums>
struct LaneSums {
  double of[kSums][kNormLanes] = {};
};

// Some rows of a block of channels: `width` channels, rows `stride` apart, from `image` on in
// tensors like x, and from `channel` on in those that have one entry a channel.
struct Chunk {
  int64_t image, channel, rows, stride, width;

  // Calls element(i, lane) for every element, row by row. A constant width makes the compiler
  // vectorise over the lanes.
  template <typename Element>
  IMAML_INLINE void for_each(const Element& element) const {
    if (width == kNormLanes) {
      for (int64_t row = 0; row < rows; ++row)
#pragma GCC ivdep
        for (int64_t lane = 0; lane < kNormLanes; ++lane)
          element(image + row * stride + lane, lane);
    } else {
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t lane = 0; lane < width; ++lane) element(image + row * stride + lane, lane);
    }
  }
};

// The blocks of one task, in chunks.
struct TaskBlocks {
  const NormShape& shape;
  int64_t task;
  Blocks blocks;

  std::size_t count() const { return static_cast<std::size_t>(blocks.last - blocks.first); }
  std::size_t index(const Chunk& chunk) const {
    return static_cast<std::size_t>((chunk.channel - task * shape.channels) / kNormLanes -
                                    blocks.first);
  }

  IMAML_INLINE Chunk chunk(int64_t block, int64_t row, int64_t rows) const {
    const int64_t first = block * kNormLanes;
    return {(task * shape.rows + row) * shape.channels + first, task * shape.channels + first, rows,
            shape.channels, std::min(kNormLanes, shape.channels - first)};
  }

  // Calls visit(chunk), all blocks of some rows before the next rows.
  template <typename Visit>
  IMAML_INLINE void for_chunks(const Visit& visit) const {
    for (int64_t row = 0; row < shape.rows; row += kNormRows)
      for (int64_t block = blocks.first; block < blocks.last; ++block)
        visit(chunk(block, row, std::min(kNormRows, shape.rows - row)));
  }

  // Calls use(chunk, means) for every block, with the means over all rows of the sums that
  // add(chunk, sums) adds up; the chunk stands for the block.
  template <int kSums, typename Add, typename Use>
  IMAML_INLINE void reduce(const Add& add, const Use& use) const {
    std::vector<LaneSums<kSums>> sums(count());
    for_chunks([&](const Chunk& chunk) IMAML_INLINE_LAMBDA {
      LaneSums<kSums> part = sums[index(chunk)];
      add(chunk, part.of);
      sums[index(chunk)] = part;
    });
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      LaneSums<kSums>& means = sums[static_cast<std::size_t>(block - blocks.first)];
      for (auto& lanes : means.of)
        for (double& lane : lanes) lane /= static_cast<double>(shape.rows);
      use(chunk(block, 0, shape.rows), means.of);
    }
  }
};

// What a block's channels need to normalise an element, and to tell whether relu lets it pass.
template <typename T>
struct Channels {
  T mean[kNormLanes] = {}, scale[kNormLanes] = {}, factor[kNormLanes] = {}, shift[kNormLanes] = {};

  template <typename Pass>
  IMAML_INLINE Channels(const Pass& p, const Chunk& chunk) {
    for (int64_t lane = 0; lane < chunk.width; ++lane) {
      const int64_t at = chunk.channel + lane;
      mean[lane] = p.mean[at];
      scale[lane] = p.scale[at];
      factor[lane] = p.gamma[at] * p.scale[at];
      shift[lane] = p.beta[at];
    }
  }

  IMAML_INLINE T h(T x, int64_t lane) const { return (x - mean[lane]) * scale[lane]; }
  IMAML_INLINE T y(T x, int64_t lane) const {
    return (x - mean[lane]) * factor[lane] + shift[lane];
  }
  template <bool kRelu>
  IMAML_INLINE T pass(T x, T value, int64_t lane) const {
    return !kRelu || y(x, lane) > T(0) ? value : T(0);
  }
};

template <typename T>
IMAML_INLINE void run(const NormForward<T>& p, const TaskBlocks& all) {
  const T* __restrict x = p.x;
  T* __restrict y = p.y;
  const T* first = x + all.task * p.shape.rows * p.shape.channels - all.task * p.shape.channels;
  all.reduce<2>(
      [&](const Chunk& chunk, auto& sums) IMAML_INLINE_LAMBDA {
        // Against the first row, so that a large mean does not drown the variance.
        T origin[kNormLanes] = {};
        std::copy_n(first + chunk.channel, chunk.width, origin);
        chunk.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
          const double away = static_cast<double>(x[i] - origin[lane]);
          sums[0][lane] += away;
          sums[1][lane] += away * away;
        });
      },
      [&](const Chunk& block, auto& means) IMAML_INLINE_LAMBDA {
        for (int64_t lane = 0; lane < block.width; ++lane) {
          const int64_t at = block.channel + lane;
          const double away = means[0][lane];
          const double rounded = means[1][lane] - away * away;
          const double variance = rounded < 0 ? 0 : rounded;  // NaN stays
          p.mean[at] = static_cast<T>(static_cast<double>(first[at]) + away);
          p.scale[at] = static_cast<T>(1 / std::sqrt(variance + p.eps));
        }
      });
  all.for_chunks([&](const Chunk& chunk) IMAML_INLINE_LAMBDA {
    const Channels<T> channels(p, chunk);
    chunk.for_each([&](int64_t i, int64_t lane)
                       IMAML_INLINE_LAMBDA { y[i] = channels.y(x[i], lane); });
  });
}

// A block's numbers in the second pass of the backward.
template <typename T>
struct Means {
  T g[kNormLanes] = {}, hg[kNormLanes] = {};
};

template <bool kRelu, typename T>
IMAML_INLINE void run(const NormBackward<T>& p, const TaskBlocks& all) {
  const T* __restrict x = p.x, * __restrict slope = p.g;
  T* __restrict dx = p.dx;
  std::vector<Means<T>> means_of(all.count());
  all.reduce<2>(
      [&](const Chunk& chunk, auto& sums) IMAML_INLINE_LAMBDA {
        const Channels<T> channels(p, chunk);
        chunk.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
          const T g = channels.template pass<kRelu>(x[i], slope[i], lane);
          sums[0][lane] += static_cast<double>(g);
          sums[1][lane] += static_cast<double>(channels.h(x[i], lane)) * static_cast<double>(g);
        });
      },
      [&](const Chunk& block, auto& means) IMAML_INLINE_LAMBDA {
        const double rows = static_cast<double>(block.rows);
        for (int64_t lane = 0; lane < block.width; ++lane) {
          p.dbeta[block.channel + lane] = static_cast<T>(rows * means[0][lane]);
          p.dgamma[block.channel + lane] = static_cast<T>(rows * means[1][lane]);
          means_of[all.index(block)].g[lane] = static_cast<T>(means[0][lane]);
          means_of[all.index(block)].hg[lane] = static_cast<T>(means[1][lane]);
        }
      });
  all.for_chunks([&](const Chunk& chunk) IMAML_INLINE_LAMBDA {
    const Channels<T> channels(p, chunk);
    const Means<T> mean = means_of[all.index(chunk)];
    chunk.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
      const T g = channels.template pass<kRelu>(x[i], slope[i], lane);
      dx[i] = channels.factor[lane] * (g - mean.g[lane] - mean.hg[lane] * channels.h(x[i], lane));
    });
  });
}

// A block's numbers in the second pass of the double backward.
template <typename T>
struct DoubleSlopes {
  T mean_a[kNormLanes] = {}, mean_g[kNormLanes] = {}, mean_ha[kNormLanes] = {};
  T mean_hg[kNormLanes] = {}, b[kNormLanes] = {}, c[kNormLanes] = {};
  T along_g[kNormLanes] = {}, along_a[kNormLanes] = {}, along_h[kNormLanes] = {};
};

template <bool kRelu, typename T>
IMAML_INLINE void run(const NormDoubleBackward<T>& p, const TaskBlocks& all) {
  const T* __restrict x = p.x, * __restrict slope = p.g, * __restrict a = p.a;
  T* __restrict to_g = p.to_g, * __restrict to_x = p.to_x;
  std::vector<DoubleSlopes<T>> slopes(all.count());
  all.reduce<5>(
      [&](const Chunk& chunk, auto& sums) IMAML_INLINE_LAMBDA {
        const Channels<T> channels(p, chunk);
        chunk.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
          const double h = static_cast<double>(channels.h(x[i], lane));
          const double ai = static_cast<double>(a[i]);
          const double g = static_cast<double>(channels.template pass<kRelu>(x[i], slope[i], lane));
          sums[0][lane] += ai;
          sums[1][lane] += g;
          sums[2][lane] += h * ai;
          sums[3][lane] += h * g;
          sums[4][lane] += ai * g;
        });
      },
      [&](const Chunk& block, auto& means) IMAML_INLINE_LAMBDA {
        DoubleSlopes<T>& own = slopes[all.index(block)];
        for (int64_t lane = 0; lane < block.width; ++lane) {
          const int64_t at = block.channel + lane;
          const double s = static_cast<double>(p.scale[at]), b = static_cast<double>(p.b[at]);
          const double factor = static_cast<double>(p.gamma[at]) * s;
          const double ma = means[0][lane], mg = means[1][lane];
          const double mha = means[2][lane], mhg = means[3][lane];
          const double apg = means[4][lane] - ma * mg - mha * mhg;  // M(a P g)
          p.to_gamma[at] = static_cast<T>(static_cast<double>(block.rows) * s * apg);
          own.b[lane] = p.b[at];
          own.c[lane] = p.c[at];
          own.mean_a[lane] = static_cast<T>(ma);
          own.mean_g[lane] = static_cast<T>(mg);
          own.mean_ha[lane] = static_cast<T>(mha);
          own.mean_hg[lane] = static_cast<T>(mhg);
          own.along_g[lane] = static_cast<T>((b - factor * mha) * s);
          own.along_a[lane] = static_cast<T>(-factor * s * mhg);
          own.along_h[lane] = static_cast<T>(-factor * s * apg);
        }
      });
  all.for_chunks([&](const Chunk& chunk) IMAML_INLINE_LAMBDA {
    const Channels<T> channels(p, chunk);
    const DoubleSlopes<T> own = slopes[all.index(chunk)];
    chunk.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
      const T h = channels.h(x[i], lane);
      const T g = channels.template pass<kRelu>(x[i], slope[i], lane);
      const T pa = a[i] - own.mean_a[lane] - own.mean_ha[lane] * h;
      const T pg = g - own.mean_g[lane] - own.mean_hg[lane] * h;
      const T to_slope = channels.factor[lane] * pa + own.b[lane] * h + own.c[lane];
      to_g[i] = channels.template pass<kRelu>(x[i], to_slope, lane);
      to_x[i] = own.along_g[lane] * pg + own.along_a[lane] * pa + own.along_h[lane] * h;
    });
  });
}

template <typename Pass>
IMAML_INLINE void run(const Pass& pass, const TaskBlocks& all) {
  if (pass.relu)
    run<true>(pass, all);
  else
    run<false>(pass, all);
}

}  // namespace

#define IMAML_DEFINE(Pass)                                                             \
  IMAML_MULTIVERSION void norm_blocks(const Pass& pass, int64_t task, Blocks blocks) { \
    run(pass, TaskBlocks{pass.shape, task, blocks});                                   \
  }
IMAML_DEFINE(NormForward<float>)
IMAML_DEFINE(NormForward<double>)
IMAML_DEFINE(NormBackward<float>)
IMAML_DEFINE(NormBackward<double>)
IMAML_DEFINE(NormDoubleBackward<float>)
IMAML_DEFINE(NormDoubleBackward<double>)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
