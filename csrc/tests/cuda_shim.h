// Runs the CUDA kernels on the host: enough of CUDA's execution model for csrc/kernels/*.cuh.
//
// A block's threads are fibers (ucontext) on one OS thread. A thread runs until it waits, at
// __syncthreads or at a warp shuffle, and then the next one runs. In which order they run is a
// setting: forwards, backwards, shuffled, or one warp as far as it gets before the next. A kernel
// that lacks a barrier gives another result in one of the orders, unless the race needs a finer
// interleaving; threads that do not all reach a barrier are reported as a deadlock.
// Blocks run one after the other, in that order too.
//
// Under AddressSanitizer, buffers sized exactly make it find every access out of bounds.
#pragma once
#include <ucontext.h>

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
#define __shared__ static

struct ShimDim {
  unsigned x = 1;
};
inline ShimDim threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

enum class Order { kForwards, kBackwards, kShuffled, kWarpByWarp };
inline Order order = Order::kForwards;

constexpr int kWarpSize = 32;
constexpr std::size_t kStackBytes = 64 * 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
  State state = State::kReady;
};

struct Block {
  std::vector<Fiber> fibers;
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
inline Block* block = nullptr;

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

inline void entry() {
  finish_switch(nullptr, &block->scheduler_stack, &block->scheduler_stack_size);
  block->body();
  Fiber& fiber = block->fibers[block->current];
  fiber.state = State::kDone;
  start_switch(nullptr, block->scheduler_stack, block->scheduler_stack_size);
  swapcontext(&fiber.context, &block->scheduler);
}

inline void wait(State state) {
  Fiber& fiber = block->fibers[block->current];
  fiber.state = state;
  start_switch(&fiber.fake_stack, block->scheduler_stack, block->scheduler_stack_size);
  swapcontext(&fiber.context, &block->scheduler);
  finish_switch(fiber.fake_stack, &block->scheduler_stack, &block->scheduler_stack_size);
}

inline void resume(unsigned thread) {
  block->current = thread;
  threadIdx.x = thread;
  Fiber& fiber = block->fibers[thread];
  fiber.state = State::kReady;
  start_switch(&block->scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&block->scheduler, &fiber.context);
  finish_switch(block->scheduler_fake_stack, nullptr, nullptr);
}

inline std::vector<unsigned> schedule(unsigned count) {
  static std::mt19937 generator(1);
  std::vector<unsigned> threads(count);
  for (unsigned k = 0; k < count; ++k) threads[k] = order == Order::kBackwards ? count - 1 - k : k;
  if (order == Order::kShuffled)
    for (unsigned k = count; k > 1; --k) std::swap(threads[k - 1], threads[generator() % k]);
  return threads;
}

// Lets go of a group of threads if all of them wait at the same kind of barrier.
inline bool release(unsigned first, unsigned last, State barrier) {
  for (unsigned k = first; k < last; ++k)
    if (block->fibers[k].state != barrier) return false;
  for (unsigned k = first; k < last; ++k) block->fibers[k].state = State::kReady;
  return true;
}

inline void run_block(const std::function<void()>& body, unsigned threads) {
  Block here;
  block = &here;
  here.body = body;
  here.fibers.resize(threads);
  for (auto& slots : here.exchange) slots.assign(threads, NAN);
  here.shuffles.assign(threads, 0);
  for (Fiber& fiber : here.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  const unsigned ahead = order == Order::kWarpByWarp ? kWarpSize : threads;
  for (;;) {
    bool moved = false;
    for (unsigned start = 0; start < threads; start += ahead) {
      bool warp_moved = true;
      while (warp_moved) {
        for (unsigned thread : schedule(ahead))
          if (here.fibers[start + thread].state == State::kReady) resume(start + thread);
        warp_moved = false;
        for (unsigned first = start; first < start + ahead; first += kWarpSize)
          warp_moved |= release(first, first + kWarpSize, State::kAtWarpBarrier);
        moved |= warp_moved;
      }
    }
    moved |= release(0, threads, State::kAtBlockBarrier);
    if (moved) continue;
    if (release(0, threads, State::kDone)) break;
    std::fprintf(stderr, "cuda_shim: deadlock: threads wait at different barriers\n");
    std::abort();
  }
  block = nullptr;
}

}  // namespace shim

inline void __syncthreads() { shim::wait(shim::State::kAtBlockBarrier); }

inline double __shfl_xor_sync(unsigned, double value, int mask) {
  const unsigned lane = shim::block->current;
  auto& slots = shim::block->exchange[shim::block->shuffles[lane]++ % 2];
  slots[lane] = value;
  shim::wait(shim::State::kAtWarpBarrier);
  return slots[lane ^ static_cast<unsigned>(mask)];
}

namespace imaml::cuda {

using Stream = void*;

// `threads` is kThreads; device.cuh, which includes this, has not defined it yet.
template <int threads = 256, typename... Params, typename... Args>
int launch(void (*kernel)(Params...), std::int64_t blocks, Stream, Args... args) {
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = threads;
  for (unsigned index : shim::schedule(gridDim.x)) {
    blockIdx.x = index;
    shim::run_block([&] { kernel(args...); }, threads);
  }
  return 0;
}

}  // namespace imaml::cuda
