// Runs the CUDA kernels on the host: as much of CUDA's execution model as csrc/cuda/*.cuh needs.
//
// The threads of a block are fibers on one OS thread. A thread runs until it waits at __syncthreads
// or at a warp shuffle; then the next one runs. Their order is a setting: forwards, backwards,
// shuffled, or warp by warp, each as far as it gets, starting with the first warp or with the last.
// A kernel that lacks a barrier gives a different result in one of the orders, unless the race
// needs a finer interleaving; threads that do not all reach a barrier are reported as a deadlock.
// Blocks run one after the other, in the same order; those of a cluster each as far as it gets
// before the next. Dynamic shared memory exists while its block runs, and is initialised to NaN;
// access to that of a block that has not started or has ended is reported.
//
// Under AddressSanitizer, with buffers of exact size, every access out of bounds is found.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static

struct ShimDim {
  unsigned x = 1;
};
inline ShimDim threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

enum class Order { kForwards, kBackwards, kShuffled, kWarpByWarp, kLastWarpFirst };
inline Order order = Order::kForwards;

constexpr int kWarpSize = 32;

enum class State { kReady, kAtClusterBarrier, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  Context context{};
  char* stack = nullptr;
  void* fake_stack = nullptr;
  State state = State::kReady;
  unsigned arrivals = 0;  // at cluster barriers
};

// A cluster that runs. Threads are numbered block by block.
struct Cluster {
  unsigned threads = 0;      // per block
  unsigned first_block = 0;  // in the grid
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> shared;  // dynamic, per block; null while it does not run
  Context scheduler{};
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
  std::function<void()> body;
  unsigned current = 0;
  // Two slots per lane, since a lane may be one shuffle ahead of its warp.
  std::vector<double> exchange[2];
  std::vector<unsigned> shuffles;
};
inline Cluster* cluster = nullptr;

// The device that cuda::cluster_capacity describes. [k] is for clusters of 2^k blocks: how many run
// at the same time, and the dynamic shared memory available to each of their blocks, in bytes.
struct Device {
  std::array<int, 5> clusters;
  std::array<std::int64_t, 5> shared_bytes;
};
inline Device device{};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s\n", what);
  std::abort();
}

// Never returns, so ThreadSanitizer's call stack would grow with every fiber.
__attribute__((no_sanitize("thread"))) inline void entry() {
  finish_switch(nullptr, &cluster->scheduler_stack, &cluster->scheduler_stack_size);
  cluster->body();
  Fiber& fiber = cluster->fibers[cluster->current];
  fiber.state = State::kDone;
  start_switch(nullptr, cluster->scheduler_stack, cluster->scheduler_stack_size);
  switch_context(&fiber.context, &cluster->scheduler);
}

inline void wait(State state) {
  Fiber& fiber = cluster->fibers[cluster->current];
  fiber.state = state;
  start_switch(&fiber.fake_stack, cluster->scheduler_stack, cluster->scheduler_stack_size);
  switch_context(&fiber.context, &cluster->scheduler);
  finish_switch(fiber.fake_stack, &cluster->scheduler_stack, &cluster->scheduler_stack_size);
}

inline void resume(unsigned thread) {
  cluster->current = thread;
  threadIdx.x = thread % cluster->threads;
  blockIdx.x = cluster->first_block + thread / cluster->threads;
  Fiber& fiber = cluster->fibers[thread];
  fiber.state = State::kReady;
  start_switch(&cluster->scheduler_fake_stack, fiber.stack, kStackBytes);
  switch_context(&cluster->scheduler, &fiber.context);
  finish_switch(cluster->scheduler_fake_stack, nullptr, nullptr);
}

inline std::vector<unsigned> schedule(unsigned count) {
  static std::mt19937 generator(1);
  std::vector<unsigned> threads(count);
  for (unsigned k = 0; k < count; ++k) threads[k] = order == Order::kBackwards ? count - 1 - k : k;
  if (order == Order::kShuffled)
    for (unsigned k = count; k > 1; --k) std::swap(threads[k - 1], threads[generator() % k]);
  return threads;
}

inline bool all_in(State state, unsigned first, unsigned last) {
  for (unsigned k = first; k < last; ++k)
    if (cluster->fibers[k].state != state) return false;
  return true;
}

// Releases threads first ... last - 1 if all of them wait at this kind of barrier.
inline bool release(unsigned first, unsigned last, State barrier) {
  if (!all_in(barrier, first, last)) return false;
  for (unsigned k = first; k < last; ++k) cluster->fibers[k].state = State::kReady;
  return true;
}

// Releases the threads whose cluster barrier all other threads have reached or exited before.
inline bool release_cluster() {
  unsigned fewest = ~0u;
  for (const Fiber& fiber : cluster->fibers)
    if (fiber.state != State::kDone) fewest = std::min(fewest, fiber.arrivals);
  bool released = false;
  for (Fiber& fiber : cluster->fibers)
    if (fiber.state == State::kAtClusterBarrier && fiber.arrivals <= fewest) {
      fiber.state = State::kReady;
      released = true;
    }
  return released;
}

// Runs a block, the threads first ... last - 1, as far as they get. Returns whether any made
// progress.
inline bool run_block(unsigned first, unsigned last) {
  const bool by_warp = order == Order::kWarpByWarp || order == Order::kLastWarpFirst;
  const unsigned ahead = by_warp ? kWarpSize : last - first;
  bool progress = false;
  for (bool again = true; again;) {
    again = false;
    for (unsigned done = 0; done < last - first; done += ahead) {
      const unsigned start = order == Order::kLastWarpFirst ? last - done - ahead : first + done;
      for (bool warp_progress = true; warp_progress;) {
        warp_progress = false;
        for (unsigned thread : schedule(ahead))
          if (cluster->fibers[start + thread].state == State::kReady) {
            resume(start + thread);
            progress = true;
          }
        for (unsigned warp = start; warp < start + ahead; warp += kWarpSize)
          warp_progress |= release(warp, warp + kWarpSize, State::kAtWarpBarrier);
      }
    }
    again = release(first, last, State::kAtBlockBarrier);
  }
  return progress;
}

inline void run_cluster(const std::function<void()>& body, unsigned first_block, unsigned blocks,
                        unsigned threads, std::size_t shared_bytes) {
  Cluster here;
  cluster = &here;
  here.threads = threads;
  here.first_block = first_block;
  here.body = body;
  here.fibers.resize(blocks * threads);
  here.shared.resize(blocks);
  for (auto& slots : here.exchange) slots.assign(blocks * threads, NAN);
  here.shuffles.assign(blocks * threads, 0);
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < here.fibers.size()) stacks.emplace_back(new char[kStackBytes]);
  for (std::size_t k = 0; k < here.fibers.size(); ++k) {
    here.fibers[k].stack = stacks[k].get();
    prepare(here.fibers[k].context, here.fibers[k].stack, entry);
  }
  std::vector<bool> ended(blocks);
  for (bool running = true; running;) {
    bool progress = false;
    for (unsigned block : schedule(blocks)) {
      if (ended[block]) continue;
      if (here.shared[block] == nullptr) {
        here.shared[block].reset(new char[shared_bytes]);
        std::memset(here.shared[block].get(), 0xff, shared_bytes);
      }
      const unsigned first = block * threads, last = first + threads;
      progress |= run_block(first, last);
      if (all_in(State::kDone, first, last)) {
        here.shared[block].reset();
        ended[block] = true;
      }
    }
    progress |= release_cluster();
    running = std::find(ended.begin(), ended.end(), false) != ended.end();
    if (running && !progress) fail("deadlock: threads wait at different barriers");
  }
  cluster = nullptr;
}

inline char* shared_of(unsigned block) {
  char* const shared = cluster->shared[block].get();
  if (shared == nullptr)
    fail("access to shared memory of a block that has not started or has ended");
  return shared;
}

}  // namespace shim

inline void __syncthreads() { shim::wait(shim::State::kAtBlockBarrier); }

inline double __shfl_xor_sync(unsigned, double value, int mask) {
  const unsigned lane = shim::cluster->current;
  auto& slots = shim::cluster->exchange[shim::cluster->shuffles[lane]++ % 2];
  slots[lane] = value;
  shim::wait(shim::State::kAtWarpBarrier);
  return slots[lane ^ static_cast<unsigned>(mask)];
}

namespace imaml::cuda {

inline double* dynamic_shared() {
  return reinterpret_cast<double*>(
      shim::shared_of(shim::cluster->current / shim::cluster->threads));
}

inline void cluster_arrive() { ++shim::cluster->fibers[shim::cluster->current].arrivals; }
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() { shim::wait(shim::State::kAtClusterBarrier); }

inline double* in_block(double* own, unsigned block) {
  return reinterpret_cast<double*>(shim::shared_of(block)) + (own - dynamic_shared());
}

inline int cluster_capacity(const void*, int blocks, std::int64_t shared_bytes) {
  std::size_t k = 0;
  while (1 << k < blocks) ++k;
  return shared_bytes <= shim::device.shared_bytes[k] ? shim::device.clusters[k] : 0;
}

// `threads` is kThreads, which device.cuh defines only after it includes this header.
template <int threads = 256, typename... Params, typename... Args>
int launch_clusters(void (*kernel)(Params...), std::int64_t clusters, int blocks,
                    std::int64_t shared_bytes, void*, Args... args) {
  const unsigned size = static_cast<unsigned>(blocks);
  gridDim.x = static_cast<unsigned>(clusters) * size;
  blockDim.x = threads;
  for (unsigned index : shim::schedule(static_cast<unsigned>(clusters)))
    shim::run_cluster([&] { kernel(args...); }, index * size, size, threads,
                      static_cast<std::size_t>(shared_bytes));
  return 0;
}

template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), std::int64_t blocks, void* stream, Args... args) {
  return launch_clusters(kernel, blocks, 1, 0, stream, args...);
}

}  // namespace imaml::cuda
