// channel_sums:  out[b, c] = sum over r of g[b, r, c].
//
// Bound by memory: reads each element once, 16 bytes at a time where the rows are aligned. A
// cluster works on kSumLanes vectors of a task's channels, 128 bytes per row; its blocks divide the
// rows. The number of blocks depends on the number of rows and on the device. Sums are in float64
// and added in a fixed order, without atomics: the same input gives the same bits on the same kind
// of device, for any batch and any alignment.
#pragma once
#include "cuda/cluster.cuh"
#include "cuda/launch.h"
#include "cuda/vector.cuh"
#include "norm_formulas.h"

namespace imaml::cuda {

constexpr int kSumLanes = 8;
constexpr int kSumRows = kThreads / kSumLanes;  // read by a block at a time
constexpr int kSumBatch = 4;                    // reads in flight per thread
constexpr int64_t kSumBlockRows = kSumRows * kSumBatch;

template <typename T>
struct ChannelSumsShared {
  double warp_sum[kVector<T> * kWarps * kSumLanes];
  double sums[kVector<T> * kSumLanes * kPortableCluster];
};

// The first `count` elements, followed by zeros.
template <bool kAligned, typename T>
__device__ Vector<T> load_channels(const T* from, int count) {
  if constexpr (kAligned) return *reinterpret_cast<const Vector<T>*>(from);
  Vector<T> read{};
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k)
    if (k < count) read.of[k] = from[k];
  return read;
}

// Adds rows first ... last - 1 of the thread's channels. Several are read before the first is
// added.
template <bool kAligned, typename T>
__device__ void add_rows(const T* __restrict__ from, int64_t stride, int64_t first, int64_t last,
                         int count, double (&sum)[kVector<T>]) {
  for (int64_t start = first + threadIdx.x / kSumLanes; start < last; start += kSumBlockRows) {
    Vector<T> read[kSumBatch] = {};
#pragma unroll
    for (int k = 0; k < kSumBatch; ++k)
      if (start + k * kSumRows < last)
        read[k] = load_channels<kAligned>(from + (start + k * kSumRows) * stride, count);
#pragma unroll
    for (int k = 0; k < kSumBatch; ++k)
      for (int c = 0; c < kVector<T>; ++c) sum[c] += static_cast<double>(read[k].of[c]);
  }
}

template <bool kAligned, typename T>
__global__ void __launch_bounds__(kThreads)
    channel_sums_kernel(NormShape s, const T* g, T* out, int64_t groups, int64_t share,
                        int blocks) {
  const BlockCoord at(blocks);
  cluster_arrive_relaxed();
  ChannelSumsShared<T>& shared = *reinterpret_cast<ChannelSumsShared<T>*>(dynamic_shared());
  const int64_t task = at.row / groups;
  const int64_t channel = (at.row % groups * kSumLanes + threadIdx.x % kSumLanes) * kVector<T>;
  const int64_t left = s.channels - channel;
  const int count = static_cast<int>(left < kVector<T> ? left : kVector<T>);
  const int64_t first = at.block * share, end = first + share;
  const int64_t last = count <= 0 ? 0 : end < s.rows ? end : s.rows;

  double sum[kVector<T>] = {};
  add_rows<kAligned>(g + task * s.rows * s.channels + (count > 0 ? channel : 0), s.channels, first,
                     last, count, sum);
  block_sum<kSumLanes>(sum, shared.warp_sum);
  cluster_wait();  // every block has started
  send_sums<kSumLanes>(sum, shared.sums, blocks, at.block);
  cluster_sync(blocks);
  if (at.block != 0 || threadIdx.x >= kSumLanes) return;
  add_shares<kSumLanes>(sum, shared.sums, blocks);
#pragma unroll
  for (int c = 0; c < kVector<T>; ++c)
    if (c < count) out[task * s.channels + channel + c] = static_cast<T>(sum[c]);
}

inline int channel_sums_blocks(int64_t rows, bool clusters) {
  int blocks = 1;
  while (clusters && blocks < kPortableCluster && kSumBlockRows * blocks < rows) blocks *= 2;
  return blocks;
}

template <bool kAligned, typename T>
int channel_sums_as(const NormShape& s, const T* g, T* out, void* stream) {
  const auto kernel = channel_sums_kernel<kAligned, T>;
  constexpr int64_t bytes = sizeof(ChannelSumsShared<T>);
  const bool clusters =
      cluster_capacity(reinterpret_cast<const void*>(kernel), kPortableCluster, bytes) > 0;
  const int blocks = channel_sums_blocks(s.rows, clusters);
  constexpr int64_t width = kSumLanes * kVector<T>;
  const int64_t groups = (s.channels + width - 1) / width;
  const int64_t share = (s.rows + blocks - 1) / blocks;
  return launch_clusters(kernel, s.tasks * groups, blocks, bytes, stream, s, g, out, groups, share,
                         blocks);
}

template <typename T>
int channel_sums(const NormShape& s, const T* g, T* out, void* stream) {
  return s.channels % kVector<T> == 0 && is_aligned(g) ? channel_sums_as<true>(s, g, out, stream)
                                                       : channel_sums_as<false>(s, g, out, stream);
}

}  // namespace imaml::cuda
