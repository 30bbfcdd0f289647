// Clusters: blocks that run together and write into each other's shared memory.
//
// Compute capability 9.0 and newer; a cluster of one block runs everywhere. The blocks of cluster c
// are c * blocks ... c * blocks + blocks - 1, a row's blocks as Place numbers them. All shared
// memory of a kernel that is launched in clusters is dynamic_shared().
#pragma once
#include <array>

#include "device.cuh"

#if defined(__CUDACC__)
#include <cooperative_groups.h>

#include <map>
#include <mutex>
#include <utility>
#endif

namespace imaml::cuda {

constexpr int kClusterSizes = 5;  // 1, 2, 4, 8, 16 blocks
constexpr int kMaxCluster = 1 << (kClusterSizes - 1);
constexpr int kPortableCluster = 8;  // any device that has clusters has these

// [k]: the bytes of dynamic shared memory that each block of a cluster of 2^k blocks can have; 0
// where there are no such clusters.
using ClusterLimits = std::array<int64_t, kClusterSizes>;

#if defined(__CUDACC__)

__device__ __forceinline__ double* dynamic_shared() {
  extern __shared__ double shared[];
  return shared;
}

// What a thread wrote before cluster_arrive is seen by every thread of the cluster after
// cluster_wait.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_wait();
#endif
}

// Where `own`, in this block's shared memory, is in that of another block of the cluster.
__device__ __forceinline__ double* in_block(double* own, [[maybe_unused]] unsigned block) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(own, static_cast<int>(block));
#else
  return own;
#endif
}

// A launch of `clusters` times `blocks` blocks.
class ClusterLaunch {
 public:
  ClusterLaunch(int64_t clusters, int blocks, int64_t shared_bytes, Stream stream) {
    config_.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
    config_.blockDim = dim3(kThreads);
    config_.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config_.stream = stream;
    dimension_.id = cudaLaunchAttributeClusterDimension;
    dimension_.val.clusterDim.x = static_cast<unsigned>(blocks);
    dimension_.val.clusterDim.y = dimension_.val.clusterDim.z = 1;
    config_.attrs = &dimension_;
    config_.numAttrs = blocks > 1 ? 1 : 0;  // devices without clusters refuse even clusters of one
  }
  ClusterLaunch(const ClusterLaunch&) = delete;  // config_ points into it
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;

  const cudaLaunchConfig_t* config() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute dimension_{};
};

template <typename... Params, typename... Args>
int launch_clusters(void (*kernel)(Params...), int64_t clusters, int blocks, int64_t shared_bytes,
                    Stream stream, Args... args) {
  const ClusterLaunch launch(clusters, blocks, shared_bytes, stream);
  return static_cast<int>(cudaLaunchKernelEx(launch.config(), kernel, args...));
}

// Asks the current device about `kernel`, and lets the kernel have all that the device offers.
inline ClusterLimits ask_cluster_limits(const void* kernel, int device) {
  ClusterLimits limits{};
  cudaFuncAttributes attributes{};
  int most = 0;
  if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
          cudaSuccess &&
      cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           most - static_cast<int>(attributes.sharedSizeBytes)) == cudaSuccess)
    limits[0] = most - static_cast<int>(attributes.sharedSizeBytes);
  // By the code that would run, not by the device: a new device may run PTX of an old architecture.
  if (attributes.ptxVersion >= 90 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
          cudaSuccess) {
    for (int k = 1; k < kClusterSizes; ++k)
      for (int64_t bytes = limits[0]; limits[k] == 0 && bytes >= limits[0] / 8; bytes /= 2) {
        int fitting = 0;
        const ClusterLaunch one(1, 1 << k, bytes, nullptr);
        if (cudaOccupancyMaxActiveClusters(&fitting, kernel, one.config()) == cudaSuccess &&
            fitting > 0)
          limits[k] = bytes;
      }
  }
  cudaGetLastError();  // a refusal is an answer here; it must not look like the next launch's error
  return limits;
}

// Of the current device, which is asked once. Never waits for the device: legal in a graph capture.
inline ClusterLimits cluster_limits(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, ClusterLimits> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace({kernel, device});
  if (is_new) entry->second = ask_cluster_limits(kernel, device);
  return entry->second;
}

#endif  // otherwise all of this is in cuda_shim.h

// Replaces value[k] by its sum over all threads of a cluster, in every thread: block by block, so
// that every block gets the same bits. `block` is this block's number among `blocks`. In shared
// memory: `warp_sum` as for block_sum, and `part` for N * blocks doubles that are used only once,
// since the fastest block may be a sum ahead of the slowest. Every block must have begun.
template <int N>
__device__ void cluster_sum(double (&value)[N], double* warp_sum, double* part, int blocks,
                            int64_t block) {
  block_sum(value, warp_sum);
  if (blocks == 1) return;
  if (threadIdx.x < static_cast<unsigned>(blocks)) {
    double* there = in_block(part, threadIdx.x) + block * N;
    for (int k = 0; k < N; ++k) there[k] = value[k];
  }
  cluster_arrive();
  cluster_wait();
  for (int k = 0; k < N; ++k) {
    value[k] = 0;
    for (int j = 0; j < blocks; ++j) value[k] += part[j * N + k];
  }
}

}  // namespace imaml::cuda
