// Batch norm by the statistics of each task's own batch, its derivative and the derivative of that,
// on the CPU: plain pointers, no torch. Per task and channel, over its N rows, with M the mean:
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
// Images are [tasks, rows, channels], the rest [tasks, channels]. Bound by memory: a pass reads its
// images twice and writes once, kNormRows rows at a time through all blocks of kNormLanes channels.
// Sums are taken in float64, in an order that does not depend on how the work is shared out: the
// same input gives the same bits whatever the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "blocks.h"

namespace imaml::cpu {

using std::int64_t;

inline constexpr int64_t kNormLanes = 16;
inline constexpr int64_t kNormRows = 64;

struct NormShape {
  int64_t tasks, rows, channels;
};

template <typename T>
struct NormForward {
  NormShape shape;
  double eps;
  const T* x;
  const T* gamma;
  const T* beta;
  T* y;
  T* mean;   // M x
  T* scale;  // 1 / s
};

template <typename T>
struct NormBackward {
  NormShape shape;
  bool relu;
  const T* g;
  const T* x;
  const T* gamma;
  const T* beta;
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
  const T* b;
  const T* c;
  const T* g;
  const T* x;
  const T* gamma;
  const T* beta;
  const T* mean;
  const T* scale;
  T* to_g;
  T* to_x;
  T* to_gamma;
};

#define IMAML_DECLARE(Pass) void norm_blocks(const Pass&, int64_t task, Blocks);
IMAML_DECLARE(NormForward<float>)
IMAML_DECLARE(NormForward<double>)
IMAML_DECLARE(NormBackward<float>)
IMAML_DECLARE(NormBackward<double>)
IMAML_DECLARE(NormDoubleBackward<float>)
IMAML_DECLARE(NormDoubleBackward<double>)
#undef IMAML_DECLARE

// `pass` is any of the three above.
template <typename Pass, typename ParallelFor>
void batch_norm(const Pass& pass, int threads, const ParallelFor& parallel_for) {
  const int64_t blocks = (pass.shape.channels + kNormLanes - 1) / kNormLanes;
  for_blocks(pass.shape.tasks, blocks, threads, parallel_for,
             [&](int64_t task, Blocks range) { norm_blocks(pass, task, range); });
}

}  // namespace imaml::cpu
