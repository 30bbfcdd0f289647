// The CPU kernels and the emulated CUDA kernels against a float64 oracle, at sizes that straddle
// every boundary.
//
// Also: the same bits whatever the number of threads, and whatever order the emulated threads run
// in. Buffers have exactly the size that a kernel may touch, so that AddressSanitizer sees the
// rest.
#include "harness.h"
#include "kernels/cluster.cuh"

namespace imaml {
namespace {

// The emulation can tell a race: this kernel lacks the barrier between write and read.
__global__ void racy_kernel(double* out) {
  __shared__ double cell[256];
  cell[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = cell[(threadIdx.x + 1) % 256];
}

// The same for a write after read: a warp may be a round ahead of one that has yet to read.
__global__ void reusing_kernel(double* out) {
  __shared__ double cell[8];
  double total = 0;
  for (int round = 0; round < 2; ++round) {
    const double value = __shfl_xor_sync(0xffffffffu, double(threadIdx.x * (round + 1)), 1);
    if (threadIdx.x % 32 == 0) cell[threadIdx.x / 32] = value;
    __syncthreads();
    for (int warp = 0; warp < 8; ++warp) total += cell[warp];
  }
  out[threadIdx.x] = total;
}

// And between the blocks of a cluster: each writes to the next and does not wait for its own.
__global__ void racy_cluster_kernel(double* out) {
  cuda::cluster_arrive();
  cuda::cluster_wait();  // every block has begun
  const unsigned rank = blockIdx.x % 4;
  if (threadIdx.x == 0) cuda::in_block(cuda::dynamic_shared(), (rank + 1) % 4)[0] = rank;
  __syncthreads();
  out[blockIdx.x * 256 + threadIdx.x] = cuda::dynamic_shared()[0];
  cuda::cluster_arrive();
  cuda::cluster_wait();  // none ends before all have written
}

void test_the_emulation_sees_a_missing_barrier() {
  context = "cuda_shim";
  std::vector<double> forwards(256), backwards(256);
  shim::order = shim::Order::kForwards;
  cuda::launch(racy_kernel, 1, nullptr, forwards.data());
  shim::order = shim::Order::kBackwards;
  cuda::launch(racy_kernel, 1, nullptr, backwards.data());
  expect(!same_bits(forwards, backwards), "a kernel without its barrier gives one result");
  shim::order = shim::Order::kForwards;
  cuda::launch(reusing_kernel, 1, nullptr, forwards.data());
  shim::order = shim::Order::kWarpByWarp;
  cuda::launch(reusing_kernel, 1, nullptr, backwards.data());
  expect(!same_bits(forwards, backwards), "a write after read without a barrier gives one result");
  forwards.resize(2 * 4 * 256);
  backwards.resize(2 * 4 * 256);
  shim::order = shim::Order::kForwards;
  cuda::launch_clusters(racy_cluster_kernel, 2, 4, sizeof(double), nullptr, forwards.data());
  shim::order = shim::Order::kBackwards;
  cuda::launch_clusters(racy_cluster_kernel, 2, 4, sizeof(double), nullptr, backwards.data());
  expect(!same_bits(forwards, backwards), "a cluster without its barrier gives one result");
}

}  // namespace
}  // namespace imaml

int main() {
  std::printf("instruction set: %s\n", imaml::cpu::instruction_set());
  imaml::test_the_emulation_sees_a_missing_barrier();
  imaml::test_cg_step();
  imaml::test_prox();
  std::printf("%d checks, %d failed\n", imaml::checks, imaml::failures);
  return imaml::failures == 0 ? 0 : 1;
}
