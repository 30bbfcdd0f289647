// The CPU kernels and the emulated CUDA kernels, compared with a float64 oracle at sizes around
// every boundary; the bits must not depend on the number of threads nor on the order of the
// emulated threads.
#include "cuda/cluster.cuh"
#include "harness.h"

namespace imaml {
namespace {

// A race that the emulation must detect: no barrier between write and read.
__global__ void racy_kernel(double* out) {
  __shared__ double cell[256];
  cell[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = cell[(threadIdx.x + 1) % 256];
}

// A write after read: a warp may be one round ahead of another that has not read yet.
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

// Between the blocks of a cluster: each writes to the next and does not wait for its own value.
__global__ void racy_cluster_kernel(double* out) {
  cuda::cluster_arrive();
  cuda::cluster_wait();  // every block has started
  const unsigned rank = blockIdx.x % 4;
  if (threadIdx.x == 0) cuda::in_block(cuda::dynamic_shared(), (rank + 1) % 4)[0] = rank;
  __syncthreads();
  out[blockIdx.x * 256 + threadIdx.x] = cuda::dynamic_shared()[0];
  cuda::cluster_arrive();
  cuda::cluster_wait();  // no block exits before all have written
}

void test_the_emulation_detects_a_missing_barrier() {
  context = "cuda_shim";
  std::vector<double> forwards(256), backwards(256);
  shim::order = shim::Order::kForwards;
  cuda::launch(racy_kernel, 1, nullptr, forwards.data());
  shim::order = shim::Order::kBackwards;
  cuda::launch(racy_kernel, 1, nullptr, backwards.data());
  expect(!same_bits(forwards, backwards), "a missing barrier is not detected");
  shim::order = shim::Order::kForwards;
  cuda::launch(reusing_kernel, 1, nullptr, forwards.data());
  shim::order = shim::Order::kWarpByWarp;
  cuda::launch(reusing_kernel, 1, nullptr, backwards.data());
  expect(!same_bits(forwards, backwards), "a write after read is not detected");
  // The first warp is correct if it runs first.
  shim::order = shim::Order::kWarpByWarp;
  cuda::launch(reusing_kernel, 1, nullptr, forwards.data());
  shim::order = shim::Order::kLastWarpFirst;
  cuda::launch(reusing_kernel, 1, nullptr, backwards.data());
  expect(forwards[0] != backwards[0], "the last warp never runs first");
  forwards.resize(2 * 4 * 256);
  backwards.resize(2 * 4 * 256);
  shim::order = shim::Order::kForwards;
  cuda::launch_clusters(racy_cluster_kernel, 2, 4, sizeof(double), nullptr, forwards.data());
  shim::order = shim::Order::kBackwards;
  cuda::launch_clusters(racy_cluster_kernel, 2, 4, sizeof(double), nullptr, backwards.data());
  expect(!same_bits(forwards, backwards), "a missing cluster barrier is not detected");
}

constexpr int kShares = 8;

struct Sums {
  double of[2];
};

// out[j] = the sums of `shares` values and of their squares, as computed by thread j. The values
// are divided among the blocks of a cluster.
__global__ void sum_kernel(const double* values, Sums* out, int shares, int blocks) {
  const cuda::BlockCoord at(blocks);
  double* const shared = cuda::dynamic_shared();
  double* const part = shared + 2 * cuda::kWarps;
  const int own = shares / blocks;
  double sum[2];
  cuda::cluster_arrive_relaxed();
  for (int n = 0; n < own; ++n) {
    const int64_t share = at.block * own + n;
    const double value = threadIdx.x == 0 ? values[at.row * shares + share] : 0;
    sum[0] = value;
    sum[1] = value * value;
    cuda::block_sum(sum, shared);
    if (n == 0) cuda::cluster_wait();
    cuda::send_sums(sum, part, blocks, share);
  }
  cuda::cluster_sync(blocks);
  cuda::add_shares(sum, part, shares);
  for (int k = 0; k < 2; ++k) out[blockIdx.x * cuda::kThreads + threadIdx.x].of[k] = sum[k];
}

// In any other order 1e16 would absorb other terms.
void test_every_block_of_a_cluster_adds_in_the_same_order() {
  const std::vector<double> values = {1,    1e16, 3, -1e16, 5, 1e16, -7,   -1e16,  // one cluster
                                      1e16, 1,    1, -1e16, 9, 1e-3, 1e16, 2};
  for (const int blocks : {8, 4, 2, 1})
    for (auto order : {shim::Order::kForwards, shim::Order::kBackwards}) {
      context = "cluster sums, blocks " + std::to_string(blocks) + ", order " +
                std::to_string(static_cast<int>(order));
      shim::order = order;
      std::vector<Sums> got(at(2 * blocks * cuda::kThreads));
      cuda::launch_clusters(sum_kernel, 2, blocks, (2 * cuda::kWarps + 2 * kShares) * 8, nullptr,
                            values.data(), got.data(), kShares, blocks);
      for (std::size_t cluster = 0; cluster < 2; ++cluster) {
        double sum = 0, squares = 0;
        for (std::size_t j = 0; j < kShares; ++j) {
          sum += values[cluster * kShares + j];
          squares += values[cluster * kShares + j] * values[cluster * kShares + j];
        }
        const std::size_t threads = at(blocks * cuda::kThreads);
        for (std::size_t j = 0; j < threads; ++j) {
          const Sums& one = got[cluster * threads + j];
          expect(one.of[0] == sum && one.of[1] == squares, "a different order of summation");
        }
      }
    }
}

}  // namespace
}  // namespace imaml

int main() {
  std::printf("instruction set: %s\n", imaml::cpu::instruction_set());
  imaml::test_the_emulation_detects_a_missing_barrier();
  imaml::test_every_block_of_a_cluster_adds_in_the_same_order();
  imaml::test_cg_step();
  imaml::test_prox();
  imaml::test_layers();
  imaml::test_program();
  std::printf("%lld checks, %d failed\n", static_cast<long long>(imaml::checks), imaml::failures);
  return imaml::failures == 0 ? 0 : 1;
}
