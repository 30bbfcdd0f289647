#include "cpu/batch_norm.h"

#include <algorithm>
#include <vector>

#include "cpu/isa.h"

namespace imaml::cpu {
namespace {

// kSums sums for each channel of a block.
template <int kSums>
struct LaneSums {
  double values[kSums][kNormLanes] = {};
};

// Some rows of a block of channels: `width` channels, rows `stride` elements apart, starting at
// index `image` of tensors like x and at index `channel` of tensors with one entry per channel.
struct Chunk {
  int64_t task, image, channel, rows, stride, width;

  ChannelCoord coord(int64_t lane) const { return {task, channel + lane}; }

  // Calls element(i, lane) for every element, row by row. The constant width lets the compiler
  // vectorise over lanes.
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
    return {task,
            (task * shape.rows + row) * shape.channels + first,
            task * shape.channels + first,
            rows,
            shape.channels,
            std::min(kNormLanes, shape.channels - first)};
  }

  // Calls visit(chunk), for all blocks of some rows before the next rows.
  template <typename Visit>
  IMAML_INLINE void for_chunks(const Visit& visit) const {
    for (int64_t row = 0; row < shape.rows; row += kNormRows)
      for (int64_t block = blocks.first; block < blocks.last; ++block)
        visit(chunk(block, row, std::min(kNormRows, shape.rows - row)));
  }

  // Adds up sums with add(chunk, sums) for every chunk, then calls use(block, means) for every
  // block with their means over all rows.
  template <int kSums, typename Add, typename Use>
  IMAML_INLINE void reduce(const Add& add, const Use& use) const {
    std::vector<LaneSums<kSums>> sums(count());
    for_chunks([&](const Chunk& chunk) IMAML_INLINE_LAMBDA {
      LaneSums<kSums> part = sums[index(chunk)];
      add(chunk, part.values);
      sums[index(chunk)] = part;
    });
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      LaneSums<kSums>& means = sums[static_cast<std::size_t>(block - blocks.first)];
      for (auto& lanes : means.values)
        for (double& lane : lanes) lane /= static_cast<double>(shape.rows);
      use(chunk(block, 0, shape.rows), means.values);
    }
  }
};

// A NormChannel for each lane of a block.
template <typename T>
struct Channels {
  T mean[kNormLanes] = {}, scale[kNormLanes] = {}, factor[kNormLanes] = {}, shift[kNormLanes] = {};

  template <typename Pass>
  IMAML_INLINE Channels(const Pass& p, const Chunk& chunk) {
    for (int64_t lane = 0; lane < chunk.width; ++lane) {
      const NormChannel<T> one = norm_channel(p, chunk.coord(lane));
      mean[lane] = one.mean;
      scale[lane] = one.scale;
      factor[lane] = one.factor;
      shift[lane] = one.shift;
    }
  }

  IMAML_INLINE NormChannel<T> at(int64_t lane) const {
    return {mean[lane], scale[lane], factor[lane], shift[lane]};
  }
};

template <bool kPositive, typename T>
IMAML_INLINE void run(const NormForward<T>& p, const TaskBlocks& all) {
  const T* __restrict x = p.x;
  T* __restrict y = p.y;
  T* __restrict positive = p.positive;
  const T* first = x + all.task * p.shape.rows * p.shape.channels - all.task * p.shape.channels;
  all.reduce<2>(
      [&](const Chunk& chunk, auto& sums) IMAML_INLINE_LAMBDA {
        T origin[kNormLanes] = {};
        std::copy_n(first + chunk.channel, chunk.width, origin);
        chunk.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
          norm_terms(x[i], origin[lane],
                     [&](int k, double term) IMAML_INLINE_LAMBDA { sums[k][lane] += term; });
        });
      },
      [&](const Chunk& block, auto& means) IMAML_INLINE_LAMBDA {
        for (int64_t lane = 0; lane < block.width; ++lane) {
          const int64_t at = block.channel + lane;
          p.mean[at] = norm_mean(first[at], means[0][lane]);
          p.scale[at] = norm_scale<T>(means[0][lane], means[1][lane], p.eps);
        }
      });
  all.for_chunks([&](const Chunk& chunk) IMAML_INLINE_LAMBDA {
    const Channels<T> channels(p, chunk);
    chunk.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
      y[i] = channels.at(lane).y(x[i]);
      if constexpr (kPositive) positive[i] = positive_part(y[i]);
    });
  });
}

// The means of a block's channels in the second pass of the first derivative.
template <typename T>
struct Means {
  T g[kNormLanes] = {}, hg[kNormLanes] = {};
};

template <bool kRelu, typename T>
IMAML_INLINE void run(const NormBackward<T>& p, const TaskBlocks& all) {
  const T* __restrict x = p.x, * __restrict g = p.g;
  T* __restrict dx = p.dx;
  std::vector<Means<T>> block_means(all.count());
  all.reduce<2>(
      [&](const Chunk& chunk, auto& sums) IMAML_INLINE_LAMBDA {
        const Channels<T> channels(p, chunk);
        chunk.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
          const NormChannel<T> channel = channels.at(lane);
          norm_backward_terms(channel.h(x[i]), channel.template relu_grad<kRelu>(x[i], g[i]),
                              [&](int k, double term)
                                  IMAML_INLINE_LAMBDA { sums[k][lane] += term; });
        });
      },
      [&](const Chunk& block, auto& means) IMAML_INLINE_LAMBDA {
        const double rows = static_cast<double>(block.rows);
        for (int64_t lane = 0; lane < block.width; ++lane) {
          p.dbeta[block.channel + lane] = static_cast<T>(rows * means[0][lane]);
          p.dgamma[block.channel + lane] = static_cast<T>(rows * means[1][lane]);
          block_means[all.index(block)].g[lane] = static_cast<T>(means[0][lane]);
          block_means[all.index(block)].hg[lane] = static_cast<T>(means[1][lane]);
        }
      });
  all.for_chunks([&](const Chunk& chunk) IMAML_INLINE_LAMBDA {
    const Channels<T> channels(p, chunk);
    const Means<T> mean = block_means[all.index(chunk)];
    chunk.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
      const NormChannel<T> channel = channels.at(lane);
      dx[i] = norm_dx(channel, channel.h(x[i]), channel.template relu_grad<kRelu>(x[i], g[i]),
                      mean.g[lane], mean.hg[lane]);
    });
  });
}

// A NormCoefficients for each lane of a block.
template <typename T>
struct Coefficients {
  T values[9][kNormLanes] = {};

  IMAML_INLINE void set(int64_t lane, const NormCoefficients<T>& c) {
    const T of_lane[] = {c.mean_a, c.mean_g, c.mean_ha, c.mean_hg, c.b,
                         c.c,      c.on_pg,  c.on_pa,   c.on_h};
    for (int k = 0; k < 9; ++k) values[k][lane] = of_lane[k];
  }
  IMAML_INLINE NormCoefficients<T> at(int64_t lane) const {
    return {values[0][lane], values[1][lane], values[2][lane], values[3][lane], values[4][lane],
            values[5][lane], values[6][lane], values[7][lane], values[8][lane]};
  }
};

template <bool kRelu, typename T>
IMAML_INLINE void run(const NormDoubleBackward<T>& p, const TaskBlocks& all) {
  const T* __restrict x = p.x, * __restrict g = p.g, * __restrict a = p.a;
  T* __restrict grad_g = p.grad_g, * __restrict grad_x = p.grad_x;
  std::vector<Coefficients<T>> coefficients(all.count());
  all.reduce<5>(
      [&](const Chunk& chunk, auto& sums) IMAML_INLINE_LAMBDA {
        const Channels<T> channels(p, chunk);
        chunk.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
          const NormChannel<T> channel = channels.at(lane);
          norm_double_terms(channel.h(x[i]), channel.template relu_grad<kRelu>(x[i], g[i]), a[i],
                            [&](int k, double term) IMAML_INLINE_LAMBDA { sums[k][lane] += term; });
        });
      },
      [&](const Chunk& block, auto& means) IMAML_INLINE_LAMBDA {
        for (int64_t lane = 0; lane < block.width; ++lane) {
          const int64_t at = block.channel + lane;
          const double mean[] = {means[0][lane], means[1][lane], means[2][lane], means[3][lane],
                                 means[4][lane]};
          coefficients[all.index(block)].set(lane, norm_coefficients(p, block.coord(lane), mean));
          p.grad_gamma[at] = norm_grad_gamma(p, at, mean);
        }
      });
  all.for_chunks([&](const Chunk& chunk) IMAML_INLINE_LAMBDA {
    const Channels<T> channels(p, chunk);
    const Coefficients<T> lanes = coefficients[all.index(chunk)];
    chunk.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
      const NormChannel<T> channel = channels.at(lane);
      const NormCoefficients<T> c = lanes.at(lane);
      const T h = channel.h(x[i]);
      grad_g[i] = channel.template relu_grad<kRelu>(x[i], c.grad_g(channel, h, a[i]));
      grad_x[i] = c.grad_x(h, channel.template relu_grad<kRelu>(x[i], g[i]), a[i]);
    });
  });
}

}  // namespace

#define IMAML_DEFINE(Pass)                                                             \
  IMAML_MULTIVERSION void norm_blocks(const Pass& pass, int64_t task, Blocks blocks) { \
    const TaskBlocks all{pass.shape, task, blocks};                                    \
    includes_relu(pass) ? run<true>(pass, all) : run<false>(pass, all);                \
  }
IMAML_DEFINE(NormForward<float>)
IMAML_DEFINE(NormForward<double>)
IMAML_DEFINE(NormBackward<float>)
IMAML_DEFINE(NormBackward<double>)
IMAML_DEFINE(NormDoubleBackward<float>)
IMAML_DEFINE(NormDoubleBackward<double>)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
