// Batch norm by the statistics of each task's own batch, and its first and second derivatives: the
// operands, and the arithmetic of one channel and of one element, shared by the CPU and the CUDA
// kernels. Per task and channel, over its N rows, with M the mean:
//
//   h = (x - M x) / s,   s = sqrt(M (x - M x)^2 + eps),   P u = u - M u - M(h u) h
//
//   y = gamma h + beta
//
//   First derivative, of S with g = dS/dy (with `relu`, g counts as 0 where y <= 0):
//     dx = gamma / s P g,   dgamma = N M(h g),   dbeta = N M g
//
//   Second derivative, of S with a, b, c = dS/d(dx), dS/d(dgamma), dS/d(dbeta):
//     dS/dg     = gamma / s P a + b h + c
//     dS/dx     = ((b - gamma / s M(h a)) P g - gamma / s M(h g) P a - gamma / s M(a P g) h) / s
//     dS/dgamma = N / s M(a P g)
//
// (P is linear and symmetric, and dh = P dx / s.)
//
// x, y, g and a are [tasks, rows, channels], the others [tasks, channels]. Totals are in float64.
#pragma once
#include <cmath>

#include "formulas.h"

namespace imaml {

struct NormShape {
  std::int64_t tasks, rows, channels;
};

// [tasks, channels], contiguous within each task: a slice of rows that hold all parameters.
template <typename T>
struct TaskChannels {
  const T* values;
  std::int64_t gap;  // elements between the end of a task's row and the next row

  // `index` is the entry's index in a contiguous tensor.
  IMAML_INLINE T at(std::int64_t task, std::int64_t index) const {
    return values[index + task * gap];
  }
};

template <typename T>
struct NormForward {
  NormShape shape;
  double eps;
  const T* x;
  TaskChannels<T> gamma;
  TaskChannels<T> beta;
  T* y;
  T* positive;  // max(y, 0); null if not wanted
  T* mean;      // M x
  T* scale;     // 1 / s
};

// What both derivatives read.
template <typename T>
struct NormOperands {
  NormShape shape;
  bool relu;
  const T* g;
  const T* x;
  TaskChannels<T> gamma;
  TaskChannels<T> beta;
  const T* mean;
  const T* scale;
};

template <typename T>
struct NormBackward : NormOperands<T> {
  T* dx;
  T* dgamma;
  T* dbeta;
};

template <typename T>
struct NormDoubleBackward : NormOperands<T> {
  const T* a;
  TaskChannels<T> b;
  TaskChannels<T> c;
  T* grad_g;
  T* grad_x;
  T* grad_gamma;
};

// Whether a pass includes the ReLU that follows.
template <typename T>
bool includes_relu(const NormForward<T>& p) {
  return p.positive != nullptr;
}
template <typename T>
bool includes_relu(const NormOperands<T>& p) {
  return p.relu;
}

// Normalises the elements of a channel, and applies the derivative of relu. T may be a vector type.
template <typename T>
struct NormChannel {
  T mean, scale;
  T factor;  // gamma / s
  T shift;   // beta

  IMAML_INLINE T h(T x) const { return (x - mean) * scale; }
  IMAML_INLINE T y(T x) const { return (x - mean) * factor + shift; }
  // `grad`, or with relu 0 where y <= 0.
  template <bool kRelu>
  IMAML_INLINE T relu_grad(T x, T grad) const {
    if constexpr (kRelu)
      return y(x) > T{} ? grad : T{};
    else
      return grad;
  }
};

// A channel of a task. `index` is its index in a contiguous [tasks, channels].
struct ChannelCoord {
  std::int64_t task, index;
};

// `p` is a pass whose mean and scale are known.
template <template <typename> typename Pass, typename T>
IMAML_INLINE NormChannel<T> norm_channel(const Pass<T>& p, const ChannelCoord& coord) {
  const auto [task, index] = coord;
  return {p.mean[index], p.scale[index], p.gamma.at(task, index) * p.scale[index],
          p.beta.at(task, index)};
}

// max(y, 0). NaN stays NaN.
template <typename T>
IMAML_INLINE T positive_part(T y) {
  return y <= T{} ? T{} : y;
}

// The functions *_terms call add(k, term) with the terms, computed in Sum, whose means over a
// channel the second pass needs.

// A factor of a term, in Sum. Specialised for vectors.
template <typename Sum, typename T>
struct Factor {
  IMAML_INLINE static Sum of(T x) { return static_cast<Sum>(x); }
};

// Relative to an element of the channel, so that a large mean does not cancel the variance.
template <typename Sum, typename T, typename Add>
IMAML_INLINE void norm_terms(T x, T origin, const Add& add) {
  const Sum offset = Factor<Sum, T>::of(x - origin);
  add(0, offset);
  add(1, offset * offset);
}

template <typename T>
IMAML_INLINE T norm_mean(T first, double mean_offset) {
  return static_cast<T>(static_cast<double>(first) + mean_offset);
}

// 1 / s
template <typename T>
IMAML_INLINE T norm_scale(double mean_offset, double mean_offset2, double eps) {
  const double rounded = mean_offset2 - mean_offset * mean_offset;
  const double variance = rounded < 0 ? 0 : rounded;  // NaN stays NaN
  return static_cast<T>(1 / std::sqrt(variance + eps));
}

// `g` is a result of relu_grad.
template <typename Sum, typename T, typename Add>
IMAML_INLINE void norm_backward_terms(T h, T g, const Add& add) {
  const Sum hs = Factor<Sum, T>::of(h), gs = Factor<Sum, T>::of(g);
  add(0, gs);
  add(1, hs * gs);
}

template <typename T>
IMAML_INLINE T norm_dx(const NormChannel<T>& channel, T h, T g, T mean_g, T mean_hg) {
  return channel.factor * (g - mean_g - mean_hg * h);
}

template <typename Sum, typename T, typename Add>
IMAML_INLINE void norm_double_terms(T h, T g, T a, const Add& add) {
  const Sum hs = Factor<Sum, T>::of(h), gs = Factor<Sum, T>::of(g), as = Factor<Sum, T>::of(a);
  add(0, as);
  add(1, gs);
  add(2, hs * as);
  add(3, hs * gs);
  add(4, as * gs);
}

// A channel's coefficients in the second pass of the second derivative.
template <typename T>
struct NormCoefficients {
  T mean_a, mean_g, mean_ha, mean_hg;
  T b, c;
  T on_pg, on_pa, on_h;  // of P g, P a and h in dS/dx

  IMAML_INLINE T pa(T h, T a) const { return a - mean_a - mean_ha * h; }
  // dS/dg, before the derivative of relu
  IMAML_INLINE T grad_g(const NormChannel<T>& channel, T h, T a) const {
    return channel.factor * pa(h, a) + b * h + c;
  }
  IMAML_INLINE T grad_x(T h, T g, T a) const {
    const T pg = g - mean_g - mean_hg * h;
    return on_pg * pg + on_pa * pa(h, a) + on_h * h;
  }
};

// M(a P g), from the means of norm_double_terms.
IMAML_INLINE double norm_mean_apg(const double (&mean)[5]) {
  return mean[4] - mean[0] * mean[1] - mean[2] * mean[3];
}

template <typename T>
IMAML_INLINE NormCoefficients<T> norm_coefficients(const NormDoubleBackward<T>& p,
                                                   const ChannelCoord& coord,
                                                   const double (&mean)[5]) {
  const auto [task, index] = coord;
  const T rounded_b = p.b.at(task, index);
  const double s = static_cast<double>(p.scale[index]), b = static_cast<double>(rounded_b);
  const double factor = static_cast<double>(p.gamma.at(task, index)) * s;
  return {static_cast<T>(mean[0]),
          static_cast<T>(mean[1]),
          static_cast<T>(mean[2]),
          static_cast<T>(mean[3]),
          rounded_b,
          p.c.at(task, index),
          static_cast<T>((b - factor * mean[2]) * s),
          static_cast<T>(-factor * s * mean[3]),
          static_cast<T>(-factor * s * norm_mean_apg(mean))};
}

template <typename T>
IMAML_INLINE T norm_grad_gamma(const NormDoubleBackward<T>& p, std::int64_t index,
                               const double (&mean)[5]) {
  const double rows = static_cast<double>(p.shape.rows), s = static_cast<double>(p.scale[index]);
  return static_cast<T>(rows * s * norm_mean_apg(mean));
}

}  // namespace imaml
