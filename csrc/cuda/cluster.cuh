// Clusters: blocks that run at the same time and write to each other's shared memory.
//
// Needs compute capability 9.0; a cluster of one block runs everywhere. Cluster c consists of the
// blocks c * blocks ... c * blocks + blocks - 1, which are the blocks of a row (BlockCoord). A
// kernel launched in clusters uses no shared memory other than dynamic_shared().
#pragma once
#include "cuda/device.cuh"
#include "cuda/launch.h"

#if defined(__CUDACC__)
#include <cooperative_groups.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#endif

namespace imaml::cuda {

constexpr int kMaxCluster = 1 << (kClusterSizes - 1);
constexpr int kPortableCluster = 8;            // available on every device that has clusters
constexpr int64_t kDefaultShared = 48 * 1024;  // bytes that need no opt-in

#if defined(__CUDACC__)

__device__ __forceinline__ double* dynamic_shared() {
  extern __shared__ double shared[];
  return shared;
}

// A barrier for the threads of a cluster, in two halves. Writes before cluster_arrive are visible
// to every thread of the cluster after cluster_wait; writes before cluster_arrive_relaxed may not
// be.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The address in another block's shared memory that corresponds to `own` in this block's.
__device__ __forceinline__ double* in_block(double* own, [[maybe_unused]] unsigned block) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(own, static_cast<int>(block));
#else
  return own;
#endif
}

// The configuration of a launch of `clusters` clusters of `blocks` blocks.
class ClusterLaunch {
 public:
  ClusterLaunch(int64_t clusters, int blocks, int64_t shared_bytes, void* stream) {
    config_.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
    config_.blockDim = dim3(kThreads);
    config_.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config_.stream = static_cast<cudaStream_t>(stream);
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
                    void* stream, Args... args) {
  if (!fits_grid(clusters * blocks)) return cudaErrorInvalidConfiguration;
  const ClusterLaunch launch(clusters, blocks, shared_bytes, stream);
  const cudaError_t error = cudaLaunchKernelEx(launch.config(), kernel, args...);
  if (error != cudaSuccess) cudaGetLastError();  // clear it, or the next launch reports it again
  return static_cast<int>(error);
}

// Opts the kernel in to the device's largest shared memory per block and to clusters of any size.
inline void opt_in(const void* kernel, int device) {
  cudaFuncAttributes attributes{};
  int most = 0;
  if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
          cudaSuccess &&
      cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         most - static_cast<int>(attributes.sharedSizeBytes));
  // Depends on the loaded code, not on the device: a new device may run PTX of an old architecture.
  if (attributes.ptxVersion >= 90)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

inline int query_cluster_capacity(const void* kernel, int device, int blocks,
                                  int64_t shared_bytes) {
  int clusters = 0;
  cudaFuncAttributes attributes{};
  if (blocks == 1) {
    int processors = 0;
    if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) !=
            cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &clusters, kernel, kThreads, static_cast<std::size_t>(shared_bytes)) != cudaSuccess)
      return 0;
    return clusters * processors;
  }
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess || attributes.ptxVersion < 90)
    return 0;
  const ClusterLaunch one(1, blocks, shared_bytes, nullptr);
  return cudaOccupancyMaxActiveClusters(&clusters, kernel, one.config()) == cudaSuccess ? clusters
                                                                                        : 0;
}

// IMAML_CLUSTERS=off in the environment disables clusters, for debugging.
inline bool clusters_are_off() {
  static const bool off = [] {
    const char* const chosen = std::getenv("IMAML_CLUSTERS");
    return chosen != nullptr && std::strcmp(chosen, "off") == 0;
  }();
  return off;
}

// How many clusters of `blocks` blocks, each with `shared_bytes` of dynamic shared memory, the
// current device can run at the same time; 0 if it cannot launch one. Results are cached. Never
// synchronises: legal during graph capture.
inline int cluster_capacity(const void* kernel, int blocks, int64_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int64_t>, int> known;
  int device = 0;
  if ((blocks > 1 && clusters_are_off()) || cudaGetDevice(&device) != cudaSuccess) return 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.try_emplace({kernel, device, 0, 0}, 0).second) opt_in(kernel, device);
  const auto [entry, is_new] = known.try_emplace({kernel, device, blocks, shared_bytes}, 0);
  if (is_new) {
    if (shared_bytes > kDefaultShared)  // so that more blocks fit on a multiprocessor
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                           cudaSharedmemCarveoutMaxShared);
    entry->second = query_cluster_capacity(kernel, device, blocks, shared_bytes);
    cudaGetLastError();  // a refusal is a valid result: clear it, as above
  }
  return entry->second;
}

#endif  // cuda_shim.h defines all of this otherwise

// Sums over a cluster. A row is divided into shares. send_sums writes this block's sums of a share
// to `part` of every block, shared memory for N * kLanes doubles per share; add_shares adds them
// share by share, so that every block gets the same bits for any number of blocks. A cluster
// barrier must separate the two, every block must have started before the first send_sums, and a
// `part` must be used only once, because the fastest block may be one sum ahead of the slowest.
template <int kLanes = 1, int N>
__device__ void send_sums(const double (&value)[N], double* part, int blocks, int64_t share) {
  if (threadIdx.x >= static_cast<unsigned>(blocks * kLanes)) return;
  double* target = blocks == 1 ? part : in_block(part, threadIdx.x / kLanes);
  for (int k = 0; k < N; ++k) target[(share * kLanes + threadIdx.x % kLanes) * N + k] = value[k];
}

template <int kLanes = 1, int N>
__device__ void add_shares(double (&value)[N], const double* part, int shares) {
  for (int k = 0; k < N; ++k) {
    value[k] = 0;
    for (int j = 0; j < shares; ++j) value[k] += part[(j * kLanes + threadIdx.x % kLanes) * N + k];
  }
}

// A barrier for all threads of the cluster.
__device__ inline void cluster_sync(int blocks) {
  if (blocks == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace imaml::cuda
