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
        for (int64_t lane = 0; lane < kNormLanes; ++lane) element(image + row * stride + lane, lane);
    } else {
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t lane = 0; lane < width; ++lane) element(image + row * stride + lane, lane);
    }
  }
};

template <typename T>
IMAML_INLINE void forward(const NormForward<T>& p, const Block& block) {
  const T *__restrict x = p.x;
  T *__restrict y = p.y;
  const double count = static_cast<double>(block.rows);
  LaneSums sum, square;
  block.for_each([&](int64_t i, int64_t lane) { sum.lane[lane] += static_cast<double>(x[i]); });
  T mean[kNormLanes] = {}, factor[kNormLanes] = {}, shift[kNormLanes] = {};
  for (int64_t lane = 0; lane < block.width; ++lane)
    mean[lane] = static_cast<T>(sum.lane[lane] / count);
  block.for_each([&](int64_t i, int64_t lane) {
    const double away = static_cast<double>(x[i] - mean[lane]);
    square.lane[lane] += away * away;
  });
  for (int64_t lane = 0; lane < block.width; ++lane) {
    const int64_t at = block.channel + lane;
    const T scale = static_cast<T>(1 / std::sqrt(square.lane[lane] / count + p.eps));
    p.mean[at] = mean[lane];
    p.scale[at] = scale;
    factor[lane] = p.gamma[at] * scale;
    shift[lane] = p.beta[at];
  }
  block.for_each([&](int64_t i, int64_t lane) {
    y[i] = (x[i] - mean[lane]) * factor[lane] + shift[lane];
  });
}

template <typename T>
IMAML_INLINE void backward(const NormBackward<T>& p, const Block& block) {
  const T *__restrict x = p.x, *__restrict g = p.g;
  T *__restrict dx = p.dx;
  const double count = static_cast<double>(block.rows);
  T mean[kNormLanes] = {}, scale[kNormLanes] = {};
  for (int64_t lane = 0; lane < block.width; ++lane) {
    mean[lane] = p.mean[block.channel + lane];
    scale[lane] = p.scale[block.channel + lane];
  }
  LaneSums sum_g, sum_hg;
  block.for_each([&](int64_t i, int64_t lane) {
    const T h = (x[i] - mean[lane]) * scale[lane];
    sum_g.lane[lane] += static_cast<double>(g[i]);
    sum_hg.lane[lane] += static_cast<double>(h) * static_cast<double>(g[i]);
  });
  T factor[kNormLanes] = {}, mean_g[kNormLanes] = {}, mean_hg[kNormLanes] = {};
  for (int64_t lane = 0; lane < block.width; ++lane) {
    const int64_t at = block.channel + lane;
    p.dbeta[at] = static_cast<T>(sum_g.lane[lane]);
    p.dgamma[at] = static_cast<T>(sum_hg.lane[lane]);
    mean_g[lane] = static_cast<T>(sum_g.lane[lane] / count);
    mean_hg[lane] = static_cast<T>(sum_hg.lane[lane] / count);
    factor[lane] = p.gamma[at] * scale[lane];
  }
  block.for_each([&](int64_t i, int64_t lane) {
    const T h = (x[i] - mean[lane]) * scale[lane];
    dx[i] = factor[lane] * (g[i] - mean_g[lane] - mean_hg[lane] * h);
  });
}

template <typename T>
IMAML_INLINE void double_backward(const NormDoubleBackward<T>& p, const Block& block) {
  const T *__restrict x = p.x, *__restrict g = p.g, *__restrict a = p.a;
  T *__restrict to_g = p.to_g, *__restrict to_x = p.to_x;
  const double count = static_cast<double>(block.rows);
  T mean[kNormLanes] = {}, scale[kNormLanes] = {};
  for (int64_t lane = 0; lane < block.width; ++lane) {
    mean[lane] = p.mean[block.channel + lane];
    scale[lane] = p.scale[block.channel + lane];
  }
  LaneSums sum_a, sum_g, sum_ha, sum_hg, sum_ag;
  block.for_each([&](int64_t i, int64_t lane) {
    const double h = static_cast<double>((x[i] - mean[lane]) * scale[lane]);
    const double ai = static_cast<double>(a[i]), gi = static_cast<double>(g[i]);
    sum_a.lane[lane] += ai;
    sum_g.lane[lane] += gi;
    sum_ha.lane[lane] += h * ai;
    sum_hg.lane[lane] += h * gi;
    sum_ag.lane[lane] += ai * gi;
  });
  T mean_a[kNormLanes] = {}, mean_g[kNormLanes] = {}, mean_ha[kNormLanes] = {};
  T mean_hg[kNormLanes] = {}, factor[kNormLanes] = {}, b[kNormLanes] = {}, c[kNormLanes] = {};
  T along_g[kNormLanes] = {}, along_a[kNormLanes] = {}, along_h[kNormLanes] = {};
  for (int64_t lane = 0; lane < block.width; ++lane) {
    const int64_t at = block.channel + lane;
    const double s = static_cast<double>(scale[lane]), gamma = static_cast<double>(p.gamma[at]);
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
    factor[lane] = static_cast<T>(gamma * s);
    along_g[lane] = static_cast<T>((static_cast<double>(p.b[at]) - gamma * s * mha) * s);
    along_a[lane] = static_cast<T>(-gamma * s * s * mhg);
    along_h[lane] = static_cast<T>(-gamma * s * s * apg);
  }
  block.for_each([&](int64_t i, int64_t lane) {
    const T h = (x[i] - mean[lane]) * scale[lane];
    const T pa = a[i] - mean_a[lane] - mean_ha[lane] * h;
    const T pg = g[i] - mean_g[lane] - mean_hg[lane] * h;
    to_g[i] = factor[lane] * pa + b[lane] * h + c[lane];
    to_x[i] = along_g[lane] * pg + along_a[lane] * pa + along_h[lane] * h;
  });
}

}  // namespace

#define IMAML_DEFINE(T)                                                                         \
  IMAML_MULTIVERSION void norm_block(const NormForward<T>& p, int64_t task, int64_t channel) {  \
    forward(p, Block(p.shape, task, channel));                                                  \
  }                                                                                             \
  IMAML_MULTIVERSION void norm_block(const NormBackward<T>& p, int64_t task, int64_t channel) { \
    backward(p, Block(p.shape, task, channel));                                                 \
  }                                                                                             \
  IMAML_MULTIVERSION void norm_block(const NormDoubleBackward<T>& p, int64_t task,              \
                                     int64_t channel) {                                         \
    double_backward(p, Block(p.shape, task, channel));                                          \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace imaml::cpu
