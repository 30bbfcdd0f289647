// Batch norm by the statistics of each task's own batch, its derivative and the derivative of that,
// on the CPU: plain pointers, no torch. Per task and channel, over its N rows, with M the mean:
//
//   h = (x - M x) / s,   s = sqrt(M (x - M x)^2 + eps),   P u = u - M u - M(h u) h
//
//   y = gamma h + beta
//
//   given g = dS/dy, or, with `relu`, g = dS/d(max(y, 0)), which then counts as 0 where y <= 0:
//     dx = gamma / s P g,   dgamma = N M(h g),   dbeta = N M g
//
//   given a, b, c, the slopes of S by dx, dgamma and dbeta:
//     dS/dg     = gamma / s P a + b h + c
//     dS/dx     = ((b - gamma / s M(h a)) P g - gamma / s M(h g) P a - gamma / s M(a P g) h) / s
//     dS/dgamma = N / s M(a P g)
//
// (P is linear and symmetric, and dh = P dx / s.)
//
// Images are [tasks, rows, channels], the rest [tasks, channels]. The work is shared out by task
// and block of kNormLanes channels. A sum is taken over all rows in order, in float64: the same
// input gives the same bits whatever the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>

namespace imaml::cpu {

using std::int64_t;

inline constexpr int64_t kNormLanes = 16;

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

// One block of channels of one task.
#define IMAML_DECLARE(T)                                                  \
  void norm_block(const NormForward<T>&, int64_t task, int64_t channel);  \
  void norm_block(const NormBackward<T>&, int64_t task, int64_t channel); \
  void norm_block(const NormDoubleBackward<T>&, int64_t task, int64_t channel);
IMAML_DECLARE(float)
IMAML_DECLARE(double)
#undef IMAML_DECLARE

// `pass` is any of the three above.
template <typename Pass, typename ParallelFor>
void batch_norm(const Pass& pass, const ParallelFor& parallel_for) {
  const int64_t blocks = (pass.shape.channels + kNormLanes - 1) / kNormLanes;
  parallel_for(pass.shape.tasks * blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item)
      norm_block(pass, item / blocks, item % blocks * kNormLanes);
  });
}

}  // namespace imaml::cpu
