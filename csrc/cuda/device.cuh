// Launch geometry, block sums and the launch, shared by the CUDA kernels.
//
// This is the only CUDA header that the kernels include. Under a host compiler it includes
// csrc/tests/cuda_shim.h instead, which runs the same code thread by thread, so that CI executes it
// without a GPU.
#pragma once
#include <cstdint>

#include "formulas.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_shim.h"
#endif

namespace imaml::cuda {

using std::int64_t;

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kItems = 8;  // elements per thread that justify another block
constexpr int64_t kMaxBlocksPerRow = 512;

// Blocks per row. Depends only on the row's length, not on the device or the batch, so that sums
// have the same bits everywhere.
inline int64_t blocks_per_row(int64_t dim) {
  const int64_t wanted = (dim + kThreads * kItems - 1) / (kThreads * kItems);
  return wanted < 1 ? 1 : (wanted > kMaxBlocksPerRow ? kMaxBlocksPerRow : wanted);
}

// The row that a block works on, and its number among the row's blocks.
struct BlockCoord {
  int64_t row;
  int64_t block;
  __device__ explicit BlockCoord(int64_t blocks)
      : row(blockIdx.x / blocks), block(blockIdx.x % blocks) {}
  __device__ int64_t first() const { return block * kThreads + threadIdx.x; }
  __device__ static int64_t stride(int64_t blocks) { return blocks * kThreads; }
};

// Replaces value[k] with its sum over the threads of the block with the same number modulo kLanes
// (with one lane, over all threads), in a fixed order. `warp_sum` is shared memory for N * kWarps *
// kLanes doubles.
template <int kLanes = 1, int N>
__device__ void block_sum(double (&value)[N], double* warp_sum) {
  const int lane = threadIdx.x % kLanes;
  for (int k = 0; k < N; ++k) {
    for (int offset = kWarp / 2; offset >= kLanes; offset /= 2)
      value[k] += __shfl_xor_sync(0xffffffffu, value[k], offset);
    if (threadIdx.x % kWarp < kLanes)
      warp_sum[(k * kWarps + threadIdx.x / kWarp) * kLanes + lane] = value[k];
  }
  __syncthreads();
  for (int k = 0; k < N; ++k) {
    value[k] = 0;
    for (int w = 0; w < kWarps; ++w) value[k] += warp_sum[(k * kWarps + w) * kLanes + lane];
  }
  __syncthreads();  // before the next call overwrites warp_sum
}

template <int N>
__device__ void block_sum(double (&value)[N]) {
  __shared__ double warp_sum[N * kWarps];
  block_sum(value, warp_sum);
}

// Stores a block's sums for sum_partials. Called by one thread of the block.
template <int N>
__device__ void put_partials(const double (&value)[N], double* partial) {
  for (int k = 0; k < N; ++k) partial[blockIdx.x * int64_t{N} + k] = value[k];
}

// total[k] = sum over j < count of partial[j * N + k], in every thread, in a fixed order.
template <int N>
__device__ void sum_partials(const double* partial, int64_t count, double (&total)[N]) {
  for (int k = 0; k < N; ++k) {
    total[k] = 0;
    for (int64_t j = threadIdx.x; j < count; j += kThreads) total[k] += partial[j * N + k];
  }
  block_sum(total);
}

// A grid holds fewer than 2^31 blocks; a larger number would be truncated silently.
inline bool fits_grid(int64_t blocks) { return blocks < int64_t{1} << 31; }

#if defined(__CUDACC__)
template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), int64_t blocks, void* stream, Args... args) {
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
           static_cast<cudaStream_t>(stream)>>>(args...);
  return static_cast<int>(cudaGetLastError());
}
#endif

}  // namespace imaml::cuda
