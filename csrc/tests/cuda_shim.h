// Runs the CUDA kernels on the host: enough of CUDA's execution model for csrc/kernels/*.cuh.
//
// A block's threads are fibers (ucontext) on one OS thread. A thread runs until it waits, at
// __syncthreads or at a warp shuffle, and then the next one runs. In which order they run is a
// setting: forwards, backwards, shuffled, or one warp as far as it gets before the next, beginning
// with the first warp or with the last. A kernel that lacks a barrier gives another result in one
// of the orders, unless the race needs a finer interleaving; threads that do not all reach a
// barrier are reported as a deadlock. Blocks run one after the other, in that order too; in a
// cluster each as far as it gets before the next. Dynamic shared memory exists from a block's first
// step to its last, and begins as NaN; reaching for another block's before or after is reported.
//
// Under AddressSanitizer, buffers sized exactly make it find every access out of bounds.
#pragma once
#include <ucontext.h>

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

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define IMAML_SHIM_ASAN 1
#endif

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
constexpr std::size_t kStackBytes = 64 * 1024;

enum class State { kReady, kAtClusterBarrier, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context{};
  char* stack = nullptr;
  void* fake_stack = nullptr;
  State state = State::kReady;
  unsigned arrivals = 0;  // at the cluster's barrier
};

// All blocks of a cluster; their threads are numbered block by block.
struct Cluster {
  unsigned threads = 0;      // of a block
  unsigned first_block = 0;  // in the grid
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> shared;  // dynamic, one a block; null if it does not run
  ucontext_t scheduler{};
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
  std::function<void()> body;
  unsigned current = 0;
  // A slot per lane, two of each, since a lane may be one shuffle ahead of its warp.
  std::vector<double> exchange[2];
  std::vector<unsigned> shuffles;
};
inline Cluster* cluster = nullptr;

// What cuda::cluster_capacity answers about. [k]: of clusters of 2^k blocks, how many run at a
// time, and the bytes of dynamic shared memory that each of their blocks can have.
struct Device {
  std::array<int, 5> clusters;
  std::array<std::int64_t, 5> shared_bytes;
};
inline Device device{};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s\n", what);
  std::abort();
}

inline void start_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack,
                         [[maybe_unused]] std::size_t size) {
#if defined(IMAML_SHIM_ASAN)
  __sanitizer_start_switch_fiber(save, stack, size);
#endif
}
inline void finish_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** stack,
                          [[maybe_unused]] std::size_t* size) {
#if defined(IMAML_SHIM_ASAN)
  __sanitizer_finish_switch_fiber(fake, stack, size);
#endif
}

// Never returns: ThreadSanitizer, which counts calls, would find ever more of them open.
__attribute__((no_sanitize("thread"))) inline void entry() {
  finish_switch(nullptr, &cluster->scheduler_stack, &cluster->scheduler_stack_size);
  cluster->body();
  Fiber& fiber = cluster->fibers[cluster->current];
  fiber.state = State::kDone;
  start_switch(nullptr, cluster->scheduler_stack, cluster->scheduler_stack_size);
  swapcontext(&fiber.context, &cluster->scheduler);
}

inline void wait(State state) {
  Fiber& fiber = cluster->fibers[cluster->current];
  fiber.state = state;
  start_switch(&fiber.fake_stack, cluster->scheduler_stack, cluster->scheduler_stack_size);
  swapcontext(&fiber.context, &cluster->scheduler);
  finish_switch(fiber.fake_stack, &cluster->scheduler_stack, &cluster->scheduler_stack_size);
}

inline void resume(unsigned thread) {
  cluster->current = thread;
  threadIdx.x = thread % cluster->threads;
  blockIdx.x = cluster->first_block + thread / cluster->threads;
  Fiber& fiber = cluster->fibers[thread];
  fiber.state = State::kReady;
  start_switch(&cluster->scheduler_fake_stack, fiber.stack, kStackBytes);
  swapcontext(&cluster->scheduler, &fiber.context);
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

// Lets go of a group of threads if all of them wait at the same kind of barrier.
inline bool release(unsigned first, unsigned last, State barrier) {
  if (!all_in(barrier, first, last)) return false;
  for (unsigned k = first; k < last; ++k) cluster->fibers[k].state = State::kReady;
  return true;
}

// Lets go of the threads whose arrival at the cluster's barrier all others have matched, or ended.
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

// Runs the threads first ... last - 1, a block, as far as they get. Tells whether any moved.
inline bool run_block(unsigned first, unsigned last) {
  const bool by_warp = order == Order::kWarpByWarp || order == Order::kLastWarpFirst;
  const unsigned ahead = by_warp ? kWarpSize : last - first;
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (unsigned done = 0; done < last - first; done += ahead) {
      const unsigned start = order == Order::kLastWarpFirst ? last - done - ahead : first + done;
      for (bool warp_moved = true; warp_moved;) {
        warp_moved = false;
        for (unsigned thread : schedule(ahead))
          if (cluster->fibers[start + thread].state == State::kReady) {
            resume(start + thread);
            moved = true;
          }
        for (unsigned warp = start; warp < start + ahead; warp += kWarpSize)
          warp_moved |= release(warp, warp + kWarpSize, State::kAtWarpBarrier);
      }
    }
    again = release(first, last, State::kAtBlockBarrier);
  }
  return moved;
}

inline void prepare(Fiber& fiber, char* stack) {
  fiber.stack = stack;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
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
  for (std::size_t k = 0; k < here.fibers.size(); ++k) prepare(here.fibers[k], stacks[k].get());
  std::vector<bool> ended(blocks);
  for (bool running = true; running;) {
    bool moved = false;
    for (unsigned block : schedule(blocks)) {
      if (ended[block]) continue;
      if (here.shared[block] == nullptr) {
        here.shared[block].reset(new char[shared_bytes]);
        std::memset(here.shared[block].get(), 0xff, shared_bytes);
      }
      const unsigned first = block * threads, last = first + threads;
      moved |= run_block(first, last);
      if (all_in(State::kDone, first, last)) {
        here.shared[block].reset();
        ended[block] = true;
      }
    }
    moved |= release_cluster();
    running = std::find(ended.begin(), ended.end(), false) != ended.end();
    if (running && !moved) fail("deadlock: threads wait at different barriers");
  }
  cluster = nullptr;
}

inline char* shared_of(unsigned block) {
  char* const shared = cluster->shared[block].get();
  if (shared == nullptr) fail("shared memory of a block that has not begun, or has ended");
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

// `threads` is kThreads; device.cuh, which includes this, has not defined it yet.
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
