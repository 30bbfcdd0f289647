#include "batch_norm.h"

#include <cmath>

#include "formulas.h"
#include "isa.h"

namespace imaml::cpu {
namespace {

// A sum per channel of a block.
struct LaneSums {
  double lane[kNormLanes] = {};
};

// Where a block lies: rows of `width` channels, `stride` apart, from `image` on in tensors like x,
// and from `channel` on in those that have one entry a channel.
struct Block {
  int64_t image, channel, rows, stride, width;

  Block(const NormShape& s, int64_t task, int64_t first)
      : image(task * s.rows * s.channels + first),
        channel(task * s.channels + first),
        rows(s.rows),
        stride(s.channels),
        width(std::min(kNormLanes, s.channels - first)) {}

  // Calls element(i, lane) for every element of the block, row by row. A constant width makes the
  // compiler vectorise over the lanes.
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

// What a block's channels need to normalise an element, and to tell whether relu lets it pass.
template <typename T>
struct Channels {
  T mean[kNormLanes] = {}, scale[kNormLanes] = {}, factor[kNormLanes] = {}, shift[kNormLanes] = {};

  template <typename Pass>
  IMAML_INLINE Channels(const Pass& p, const Block& block) {
    for (int64_t lane = 0; lane < block.width; ++lane) {
      const int64_t at = block.channel + lane;
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
IMAML_INLINE void run(const NormForward<T>& p, const Block& block) {
  const T* __restrict x = p.x;
  T* __restrict y = p.y;
  const double count = static_cast<double>(block.rows);
  LaneSums sum, square;
  block.for_each([&](int64_t i, int64_t lane)
                     IMAML_INLINE_LAMBDA { sum.lane[lane] += static_cast<double>(x[i]); });
  T mean[kNormLanes] = {};
  for (int64_t lane = 0; lane < block.width; ++lane)
    p.mean[block.channel + lane] = mean[lane] = static_cast<T>(sum.lane[lane] / count);
  block.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
    const double away = static_cast<double>(x[i] - mean[lane]);
    square.lane[lane] += away * away;
  });
  for (int64_t lane = 0; lane < block.width; ++lane)
    p.scale[block.channel + lane] =
        static_cast<T>(1 / std::sqrt(square.lane[lane] / count + p.eps));
  const Channels<T> channels(p, block);
  block.for_each([&](int64_t i, int64_t lane)
                     IMAML_INLINE_LAMBDA { y[i] = channels.y(x[i], lane); });
}

template <bool kRelu, typename T>
IMAML_INLINE void run(const NormBackward<T>& p, const Block& block) {
  const T* __restrict x = p.x, * __restrict slope = p.g;
  T* __restrict dx = p.dx;
  const double count = static_cast<double>(block.rows);
  const Channels<T> channels(p, block);
  LaneSums sum_g, sum_hg;
  block.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
    const T g = channels.template pass<kRelu>(x[i], slope[i], lane);
    sum_g.lane[lane] += static_cast<double>(g);
    sum_hg.lane[lane] += static_cast<double>(channels.h(x[i], lane)) * static_cast<double>(g);
  });
  T mean_g[kNormLanes] = {}, mean_hg[kNormLanes] = {};
  for (int64_t lane = 0; lane < block.width; ++lane) {
    p.dbeta[block.channel + lane] = static_cast<T>(sum_g.lane[lane]);
    p.dgamma[block.channel + lane] = static_cast<T>(sum_hg.lane[lane]);
    mean_g[lane] = static_cast<T>(sum_g.lane[lane] / count);
    mean_hg[lane] = static_cast<T>(sum_hg.lane[lane] / count);
  }
  block.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
    const T g = channels.template pass<kRelu>(x[i], slope[i], lane);
    dx[i] = channels.factor[lane] * (g - mean_g[lane] - mean_hg[lane] * channels.h(x[i], lane));
  });
}

template <bool kRelu, typename T>
IMAML_INLINE void run(const NormDoubleBackward<T>& p, const Block& block) {
  const T* __restrict x = p.x, * __restrict slope = p.g, * __restrict a = p.a;
  T* __restrict to_g = p.to_g, * __restrict to_x = p.to_x;
  const double count = static_cast<double>(block.rows);
  const Channels<T> channels(p, block);
  LaneSums sum_a, sum_g, sum_ha, sum_hg, sum_ag;
  block.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
    const double h = static_cast<double>(channels.h(x[i], lane));
    const double ai = static_cast<double>(a[i]);
    const double gi = static_cast<double>(channels.template pass<kRelu>(x[i], slope[i], lane));
    sum_a.lane[lane] += ai;
    sum_g.lane[lane] += gi;
    sum_ha.lane[lane] += h * ai;
    sum_hg.lane[lane] += h * gi;
    sum_ag.lane[lane] += ai * gi;
  });
  T mean_a[kNormLanes] = {}, mean_g[kNormLanes] = {}, mean_ha[kNormLanes] = {};
  T mean_hg[kNormLanes] = {}, b[kNormLanes] = {}, c[kNormLanes] = {};
  T along_g[kNormLanes] = {}, along_a[kNormLanes] = {}, along_h[kNormLanes] = {};
  for (int64_t lane = 0; lane < block.width; ++lane) {
    const int64_t at = block.channel + lane;
    const double s = static_cast<double>(p.scale[at]), gamma = static_cast<double>(p.gamma[at]);
    const double ma = sum_a.lane[lane] / count, mg = sum_g.lane[lane] / count;
    const double mha = sum_ha.lane[lane] / count, mhg = sum_hg.lane[lane] / count;
    const double apg = sum_ag.lane[lane] / count - ma * mg - mha * mhg;  // M(a P g)
    b[lane] = p.b[at];
    c[lane] = p.c[at];
    p.to_gamma[at] = static_cast<T>(count * s * apg);
    mean_a[lane] = static_cast<T>(ma);
    mean_g[lane] = static_cast<T>(mg);
    mean_ha[lane] = static_cast<T>(mha);
    mean_hg[lane] = static_cast<T>(mhg);
    along_g[lane] = static_cast<T>((static_cast<double>(p.b[at]) - gamma * s * mha) * s);
    along_a[lane] = static_cast<T>(-gamma * s * s * mhg);
    along_h[lane] = static_cast<T>(-gamma * s * s * apg);
  }
  block.for_each([&](int64_t i, int64_t lane) IMAML_INLINE_LAMBDA {
    const T h = channels.h(x[i], lane);
    const T g = channels.template pass<kRelu>(x[i], slope[i], lane);
    const T pa = a[i] - mean_a[lane] - mean_ha[lane] * h;
    const T pg = g - mean_g[lane] - mean_hg[lane] * h;
    const T to_slope = channels.factor[lane] * pa + b[lane] * h + c[lane];
    to_g[i] = channels.template pass<kRelu>(x[i], to_slope, lane);
    to_x[i] = along_g[lane] * pg + along_a[lane] * pa + along_h[lane] * h;
  });
}

template <typename Pass>
IMAML_INLINE void run(const Pass& pass, const Block& block) {
  if (pass.relu)
    run<true>(pass, block);
  else
    run<false>(pass, block);
}

}  // namespace

#define IMAML_DEFINE(Pass)                                                              \
  IMAML_MULTIVERSION void norm_block(const Pass& pass, int64_t task, int64_t channel) { \
    run(pass, Block(pass.shape, task, channel));                                        \
  }
IMAML_DEFINE(NormForward<float>)
IMAML_DEFINE(NormForward<double>)
IMAML_DEFINE(NormBackward<float>)
IMAML_DEFINE(NormBackward<double>)
IMAML_DEFINE(NormDoubleBackward<float>)
IMAML_DEFINE(NormDoubleBackward<double>)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
