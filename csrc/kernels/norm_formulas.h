// Batch norm by the statistics of each task's own batch, its derivative and the derivative of that:
// operands, and the arithmetic of one channel and of one element, shared by the CPU and the CUDA
// kernels. Per task and channel, over its N rows, with M the mean:
//
//   h = (x - M x) / s,   s = sqrt(M (x - M x)^2 + eps),   P u = u - M u - M(h u) h
//
//   y = gamma h + beta
//
//   given g = dS/dy, which with `relu` counts as 0 where y <= 0:
//     dx = gamma / s P g,   dgamma = N M(h g),   dbeta = N M g
//
//   given a, b, c, the slopes of S by dx, dgamma and dbeta:
//     dS/dg     = gamma / s P a + b h + c
//     dS/dx     = ((b - gamma / s M(h a)) P g - gamma / s M(h g) P a - gamma / s M(a P g) h) / s
//     dS/dgamma = N / s M(a P g)
//
// (P is linear and symmetric, and dh = P dx / s.)
//
// Images are [tasks, rows, channels], the rest [tasks, channels]. Sums are taken in float64.
#pragma once
#include <cmath>

#include "formulas.h"

namespace imaml {

struct NormShape {
  std::int64_t tasks, rows, channels;
};

// [tasks, channels] whose rows may lie apart, as parameters do in rows of all parameters.
template <typename T>
struct TaskChannels {
  const T* values;
  std::int64_t gap;  // between the end of a row and the next one

  // `at` is the entry's place in a contiguous tensor.
  IMAML_INLINE T of(std::int64_t task, std::int64_t at) const { return values[at + task * gap]; }
};

template <typename T>
struct NormForward {
  NormShape shape;
  double eps;
  const T* x;
  TaskChannels<T> gamma;
  TaskChannels<T> beta;
  T* y;
  T* positive;  // max(y, 0), or null: not wanted
  T* mean;      // M x
  T* scale;     // 1 / s
};

template <typename T>
struct NormBackward {
  NormShape shape;
  bool relu;
  const T* g;
  const T* x;
  TaskChannels<T> gamma;
  TaskChannels<T> beta;
  const T* mean;
  const T* scale;
  T* dx;
  T* dgamma;
  T* dbeta;
};

template <typename T>
struct NormDoubleBackward {
  NormShape shape;
  bool relu;
  const T* a;
  TaskChannels<T> b;
  TaskChannels<T> c;
  const T* g;
  const T* x;
  TaskChannels<T> gamma;
  TaskChannels<T> beta;
  const T* mean;
  const T* scale;
  T* to_g;
  T* to_x;
  T* to_gamma;
};

// What normalises the elements of a channel, and tells which of them relu lets pass.
template <typename T>
struct NormChannel {
  T mean, scale;
  T factor;  // gamma / s
  T shift;   // beta

  IMAML_INLINE T h(T x) const { return (x - mean) * scale; }
  IMAML_INLINE T y(T x) const { return (x - mean) * factor + shift; }
  template <bool kRelu>
  IMAML_INLINE T pass(T x, T value) const {
    return !kRelu || y(x) > T(0) ? value : T(0);
  }
};

// A channel of a task: its place in contiguous tensors that have one entry a channel.
struct NormPlace {
  std::int64_t task, at;
};

// `p` is one of the three.
template <template <typename> typename Pass, typename T>
IMAML_INLINE NormChannel<T> norm_channel(const Pass<T>& p, const NormPlace& place) {
  const auto [task, at] = place;
  return {p.mean[at], p.scale[at], p.gamma.of(task, at) * p.scale[at], p.beta.of(task, at)};
}

// NaN stays.
template <typename T>
IMAML_INLINE T positive_part(T y) {
  return y <= T(0) ? T(0) : y;
}

// The functions named *_terms call add(k, term) with the terms whose means over a channel the
// second pass needs.

// Of x against the channel's first element, so that a large mean does not drown the variance.
template <typename T, typename Add>
IMAML_INLINE void norm_terms(T x, T first, const Add& add) {
  const double away = static_cast<double>(x - first);
  add(0, away);
  add(1, away * away);
}

template <typename T>
IMAML_INLINE T norm_mean(T first, double mean_away) {
  return static_cast<T>(static_cast<double>(first) + mean_away);
}

// 1 / s
template <typename T>
IMAML_INLINE T norm_scale(double mean_away, double mean_away2, double eps) {
  const double rounded = mean_away2 - mean_away * mean_away;
  const double variance = rounded < 0 ? 0 : rounded;  // NaN stays
  return static_cast<T>(1 / std::sqrt(variance + eps));
}

// `g` is what relu has let pass.
template <typename T, typename Add>
IMAML_INLINE void norm_backward_terms(T h, T g, const Add& add) {
  add(0, static_cast<double>(g));
  add(1, static_cast<double>(h) * static_cast<double>(g));
}

template <typename T>
IMAML_INLINE T norm_dx(const NormChannel<T>& channel, T h, T g, T mean_g, T mean_hg) {
  return channel.factor * (g - mean_g - mean_hg * h);
}

template <typename T, typename Add>
IMAML_INLINE void norm_double_terms(T h, T g, T a, const Add& add) {
  const double hd = static_cast<double>(h), gd = static_cast<double>(g);
  const double ad = static_cast<double>(a);
  add(0, ad);
  add(1, gd);
  add(2, hd * ad);
  add(3, hd * gd);
  add(4, ad * gd);
}

// A channel's numbers in the second pass of the double backward.
template <typename T>
struct NormSlopes {
  T mean_a, mean_g, mean_ha, mean_hg;
  T b, c;
  T along_g, along_a, along_h;  // of dS/dx, along P g, P a and h

  IMAML_INLINE T pa(T h, T a) const { return a - mean_a - mean_ha * h; }
  // dS/dg, before relu
  IMAML_INLINE T to_g(const NormChannel<T>& channel, T h, T a) const {
    return channel.factor * pa(h, a) + b * h + c;
  }
  IMAML_INLINE T to_x(T h, T g, T a) const {
    const T pg = g - mean_g - mean_hg * h;
    return along_g * pg + along_a * pa(h, a) + along_h * h;
  }
};

// `mean` holds the means of norm_double_terms over the channel.
IMAML_INLINE double norm_mean_apg(const double (&mean)[5]) {  // M(a P g)
  return mean[4] - mean[0] * mean[1] - mean[2] * mean[3];
}

template <typename T>
IMAML_INLINE NormSlopes<T> norm_slopes(const NormDoubleBackward<T>& p, const NormPlace& place,
                                       const double (&mean)[5]) {
  const auto [task, at] = place;
  const T own_b = p.b.of(task, at);
  const double s = static_cast<double>(p.scale[at]), b = static_cast<double>(own_b);
  const double factor = static_cast<double>(p.gamma.of(task, at)) * s;
  return {static_cast<T>(mean[0]),
          static_cast<T>(mean[1]),
          static_cast<T>(mean[2]),
          static_cast<T>(mean[3]),
          own_b,
          p.c.of(task, at),
          static_cast<T>((b - factor * mean[2]) * s),
          static_cast<T>(-factor * s * mean[3]),
          static_cast<T>(-factor * s * norm_mean_apg(mean))};
}

template <typename T>
IMAML_INLINE T norm_to_gamma(const NormDoubleBackward<T>& p, std::int64_t at,
                             const double (&mean)[5]) {
  const double rows = static_cast<double>(p.shape.rows), s = static_cast<double>(p.scale[at]);
  return static_cast<T>(rows * s * norm_mean_apg(mean));
}

}  // namespace imaml
