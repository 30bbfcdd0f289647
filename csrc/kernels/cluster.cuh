// Clusters: blocks that run together and write into each other's shared memory.
//
// Compute capability 9.0 and newer; a cluster of one block runs everywhere. The blocks of cluster c
// are c * blocks ... c * blocks + blocks - 1, a row's blocks as Place numbers them. All shared
// memory of a kernel that is launched in clusters is dynamic_shared().
#pragma once
#include "cluster_sizes.h"
#include "device.cuh"

#if defined(__CUDACC__)
#include <cooperative_groups.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#endif

namespace imaml::cuda {

constexpr int64_t kOrdinaryShared = 48 * 1024;  // bytes that any kernel can have

#if defined(__CUDACC__)

__device__ __forceinline__ double* dynamic_shared() {
  extern __shared__ double shared[];
  return shared;
}

// A barrier of a cluster's threads, in two parts. What a thread wrote before cluster_arrive is seen
// by every thread of the cluster after cluster_wait; before cluster_arrive_relaxed it need not be.
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
  if (!fits_grid(clusters * blocks)) return cudaErrorInvalidConfiguration;
  const ClusterLaunch launch(clusters, blocks, shared_bytes, stream);
  const cudaError_t error = cudaLaunchKernelEx(launch.config(), kernel, args...);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it again
  return static_cast<int>(error);
}

// Lets the kernel have, on this device, all the shared memory that a block can have, and clusters
// of any size.
inline void allow_all(const void* kernel, int device) {
  cudaFuncAttributes attributes{};
  int most = 0;
  if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
          cudaSuccess &&
      cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         most - static_cast<int>(attributes.sharedSizeBytes));
  // By the code that would run, not by the device: a new device may run PTX of an old architecture.
  if (attributes.ptxVersion >= 90)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

inline int ask_cluster_capacity(const void* kernel, int device, int blocks, int64_t shared_bytes) {
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

// IMAML_CLUSTERS=off in the environment: as on a device without clusters, to debug.
inline bool clusters_are_off() {
  static const bool off = [] {
    const char* const chosen = std::getenv("IMAML_CLUSTERS");
    return chosen != nullptr && std::strcmp(chosen, "off") == 0;
  }();
  return off;
}

// How many clusters of so many blocks, each with so many bytes of dynamic shared memory, the
// current device can run at a time; 0: it cannot launch one. Each question is asked once. Never
// waits for the device: legal in a graph capture.
inline int cluster_capacity(const void* kernel, int blocks, int64_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int64_t>, int> known;
  int device = 0;
  if ((blocks > 1 && clusters_are_off()) || cudaGetDevice(&device) != cudaSuccess) return 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.try_emplace({kernel, device, 0, 0}, 0).second) allow_all(kernel, device);
  const auto [entry, is_new] = known.try_emplace({kernel, device, blocks, shared_bytes}, 0);
  if (is_new) {
    if (shared_bytes > kOrdinaryShared)  // the more of them run on a processor, the better
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                           cudaSharedmemCarveoutMaxShared);
    entry->second = ask_cluster_capacity(kernel, device, blocks, shared_bytes);
    cudaGetLastError();  // a refusal is an answer here, not the next launch's error
  }
  return entry->second;
}

#endif  // otherwise all of this is in cuda_shim.h

// Sums over a cluster go through `part`, shared memory of each block for N * kLanes doubles a
// share: send_sums puts what this block has summed of a share into every block's, add_shares adds
// what has come, share by share, so that every block gets the same bits, whatever the number of
// blocks. A `part` is used only once, since the fastest block may be a sum ahead of the slowest.
// Between the two goes a barrier, before the first of them every block must have begun.
template <int kLanes = 1, int N>
__device__ void send_sums(const double (&value)[N], double* part, int blocks, int64_t share) {
  if (threadIdx.x >= static_cast<unsigned>(blocks * kLanes)) return;
  double* there = blocks == 1 ? part : in_block(part, threadIdx.x / kLanes);
  for (int k = 0; k < N; ++k) there[(share * kLanes + threadIdx.x % kLanes) * N + k] = value[k];
}

template <int kLanes = 1, int N>
__device__ void add_shares(double (&value)[N], const double* part, int shares) {
  for (int k = 0; k < N; ++k) {
    value[k] = 0;
    for (int j = 0; j < shares; ++j) value[k] += part[(j * kLanes + threadIdx.x % kLanes) * N + k];
  }
}

// A barrier of all threads of the cluster.
__device__ inline void cluster_sync(int blocks) {
  if (blocks == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace imaml::cuda
