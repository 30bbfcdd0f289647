// Batch norm and its two derivatives on CUDA, each in one launch that includes the ReLU after it.
// The formulas are in norm_formulas.h.
//
// Bound by memory: a pass reads its images twice, the second time from cache where they fit, and
// writes once. A cluster works on kNormLanes channels of a task, in float32 a sector of 32 bytes
// per row; its blocks divide the rows. The number of blocks depends on the number of rows and on
// the device. Sums are in float64 and added in a fixed order, without atomics: the same input gives
// the same bits on the same kind of device.
#pragma once
#include "cuda/cluster.cuh"
#include "cuda/launch.h"
#include "norm_formulas.h"

namespace imaml::cuda {

constexpr int kNormLanes = 8;
constexpr int kNormRows = kThreads / kNormLanes;  // read by a block at a time
constexpr int kNormBatch = 4;                     // reads in flight per thread
constexpr int64_t kNormBlockRows = kNormRows * kNormBatch;

// The shared memory of a block.
template <int kSums>
struct NormShared {
  double warp_sum[kSums * kWarps * kNormLanes];
  double sums[kSums * kNormLanes * kPortableCluster];
};

// A thread's work on one channel, in one of the three passes:
//   load(i)           reads an element;
//   add(read, sum)    adds its terms;
//   finish(mean)      receives the means of the terms;
//   record(mean)      writes the results with one entry per channel;
//   write(read, i)    writes the results with one entry per element.
template <bool kRelu, typename Pass>
struct NormWork;

template <bool kPositive, typename T>
struct NormWork<kPositive, NormForward<T>> {
  static constexpr int kSums = 2;
  using Read = T;
  const NormForward<T>& p;
  ChannelCoord coord;
  T first;
  NormChannel<T> channel{};

  __device__ NormWork(const NormForward<T>& p, const ChannelCoord& coord, int64_t image)
      : p(p), coord(coord), first(p.x[image]) {}
  __device__ T load(int64_t i) const { return p.x[i]; }
  __device__ void add(T x, double (&sum)[kSums]) const {
    norm_terms<double>(x, first, [&](int k, double term) { sum[k] += term; });
  }
  __device__ void finish(const double (&mean)[kSums]) {
    const auto [task, index] = coord;
    const T scale = norm_scale<T>(mean[0], mean[1], p.eps);
    channel = {norm_mean(first, mean[0]), scale, p.gamma.at(task, index) * scale,
               p.beta.at(task, index)};
  }
  __device__ void record(const double (&)[kSums]) const {
    p.mean[coord.index] = channel.mean;
    p.scale[coord.index] = channel.scale;
  }
  __device__ void write(T x, int64_t i) const {
    const T y = channel.y(x);
    p.y[i] = y;
    if constexpr (kPositive) p.positive[i] = positive_part(y);
  }
};

template <bool kRelu, typename T>
struct NormWork<kRelu, NormBackward<T>> {
  static constexpr int kSums = 2;
  struct Read {
    T h, g;
  };
  const NormBackward<T>& p;
  ChannelCoord coord;
  NormChannel<T> channel;
  T mean_g = 0, mean_hg = 0;

  __device__ NormWork(const NormBackward<T>& p, const ChannelCoord& coord, int64_t)
      : p(p), coord(coord), channel(norm_channel(p, coord)) {}
  __device__ Read load(int64_t i) const {
    return {channel.h(p.x[i]), channel.template relu_grad<kRelu>(p.x[i], p.g[i])};
  }
  __device__ void add(const Read& e, double (&sum)[kSums]) const {
    norm_backward_terms<double>(e.h, e.g, [&](int k, double term) { sum[k] += term; });
  }
  __device__ void finish(const double (&mean)[kSums]) {
    mean_g = static_cast<T>(mean[0]);
    mean_hg = static_cast<T>(mean[1]);
  }
  __device__ void record(const double (&mean)[kSums]) const {
    const double rows = static_cast<double>(p.shape.rows);
    p.dbeta[coord.index] = static_cast<T>(rows * mean[0]);
    p.dgamma[coord.index] = static_cast<T>(rows * mean[1]);
  }
  __device__ void write(const Read& e, int64_t i) const {
    p.dx[i] = norm_dx(channel, e.h, e.g, mean_g, mean_hg);
  }
};

template <bool kRelu, typename T>
struct NormWork<kRelu, NormDoubleBackward<T>> {
  static constexpr int kSums = 5;
  struct Read {
    T x, h, g, a;
  };
  const NormDoubleBackward<T>& p;
  ChannelCoord coord;
  NormChannel<T> channel;
  NormCoefficients<T> coefficients{};

  __device__ NormWork(const NormDoubleBackward<T>& p, const ChannelCoord& coord, int64_t)
      : p(p), coord(coord), channel(norm_channel(p, coord)) {}
  __device__ Read load(int64_t i) const {
    const T x = p.x[i];
    return {x, channel.h(x), channel.template relu_grad<kRelu>(x, p.g[i]), p.a[i]};
  }
  __device__ void add(const Read& e, double (&sum)[kSums]) const {
    norm_double_terms<double>(e.h, e.g, e.a, [&](int k, double term) { sum[k] += term; });
  }
  __device__ void finish(const double (&mean)[kSums]) {
    coefficients = norm_coefficients(p, coord, mean);
  }
  __device__ void record(const double (&mean)[kSums]) const {
    p.grad_gamma[coord.index] = norm_grad_gamma(p, coord.index, mean);
  }
  __device__ void write(const Read& e, int64_t i) const {
    p.grad_g[i] = channel.template relu_grad<kRelu>(e.x, coefficients.grad_g(channel, e.h, e.a));
    p.grad_x[i] = coefficients.grad_x(e.h, e.g, e.a);
  }
};

// Calls use(read, i) for the elements of a thread's channel in rows first ... last - 1. Several are
// read before the first is used.
template <typename Work, typename Use>
__device__ void for_norm_rows(const Work& work, int64_t image, int64_t stride, int64_t first,
                              int64_t last, const Use& use) {
  for (int64_t start = first + threadIdx.x / kNormLanes; start < last; start += kNormBlockRows) {
    typename Work::Read read[kNormBatch] = {};
#pragma unroll
    for (int k = 0; k < kNormBatch; ++k)
      if (start + k * kNormRows < last)
        read[k] = work.load(image + (start + k * kNormRows) * stride);
#pragma unroll
    for (int k = 0; k < kNormBatch; ++k)
      if (start + k * kNormRows < last) use(read[k], image + (start + k * kNormRows) * stride);
  }
}

template <bool kRelu, typename Pass>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(Pass pass, int64_t groups, int64_t share, int blocks) {
  using Work = NormWork<kRelu, Pass>;
  const BlockCoord at(blocks);
  cluster_arrive_relaxed();
  NormShared<Work::kSums>& shared = *reinterpret_cast<NormShared<Work::kSums>*>(dynamic_shared());
  const NormShape& s = pass.shape;
  const int64_t task = at.row / groups;
  const int64_t channel = at.row % groups * kNormLanes + threadIdx.x % kNormLanes;
  const bool active = channel < s.channels;
  const ChannelCoord coord{task, task * s.channels + (active ? channel : 0)};
  const int64_t image = task * s.rows * s.channels + (active ? channel : 0);
  const int64_t first = at.block * share;
  const int64_t last = !active ? 0 : first + share < s.rows ? first + share : s.rows;

  Work work(pass, coord, image);
  double mean[Work::kSums] = {};
  for_norm_rows(work, image, s.channels, first, last,
                [&](const auto& read, int64_t) { work.add(read, mean); });
  block_sum<kNormLanes>(mean, shared.warp_sum);
  cluster_wait();  // every block has started
  send_sums<kNormLanes>(mean, shared.sums, blocks, at.block);
  cluster_sync(blocks);
  add_shares<kNormLanes>(mean, shared.sums, blocks);
  for (double& one : mean) one /= static_cast<double>(s.rows);
  work.finish(mean);
  if (active && at.block == 0 && threadIdx.x < kNormLanes) work.record(mean);
  for_norm_rows(work, image, s.channels, first, last,
                [&](const auto& read, int64_t i) { work.write(read, i); });
}

inline int norm_blocks(int64_t rows, bool clusters) {
  int blocks = 1;
  while (clusters && blocks < kPortableCluster && kNormBlockRows * blocks < rows) blocks *= 2;
  return blocks;
}

template <bool kRelu, typename Pass>
int batch_norm_as(const Pass& pass, void* stream) {
  const auto kernel = norm_kernel<kRelu, Pass>;
  constexpr int64_t bytes = sizeof(NormShared<NormWork<kRelu, Pass>::kSums>);
  const bool clusters =
      cluster_capacity(reinterpret_cast<const void*>(kernel), kPortableCluster, bytes) > 0;
  const int blocks = norm_blocks(pass.shape.rows, clusters);
  const int64_t groups = (pass.shape.channels + kNormLanes - 1) / kNormLanes;
  const int64_t share = (pass.shape.rows + blocks - 1) / blocks;
  return launch_clusters(kernel, pass.shape.tasks * groups, blocks, bytes, stream, pass, groups,
                         share, blocks);
}

template <typename Pass>
int batch_norm(const Pass& pass, void* stream) {
  return includes_relu(pass) ? batch_norm_as<true>(pass, stream)
                             : batch_norm_as<false>(pass, stream);
}

}  // namespace imaml::cuda
