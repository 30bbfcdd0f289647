// Accesses of 16 bytes, the widest of a thread, and copies to shared memory.
#pragma once
#include "cuda/device.cuh"

namespace imaml::cuda {

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T>
struct alignas(16) Vector {
  T of[kVector<T>];
};

IMAML_INLINE std::uintptr_t address(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

IMAML_INLINE bool is_aligned(const void* pointer) { return address(pointer) % 16 == 0; }

#if defined(__CUDACC__)

// Starts to copy one T from global to shared memory, without registers. wait_for_copies() waits
// for the copies of the calling thread only.
template <typename T>
__device__ __forceinline__ void copy_async(T* to, const T* from) {
#if __CUDA_ARCH__ >= 800
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const auto global = __cvta_generic_to_global(from);
  if constexpr (sizeof(T) == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global),
                 "n"(sizeof(T))
                 : "memory");
#else
  *to = *from;
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Starts to read the cache line of an address into the L2 cache.
__device__ __forceinline__ void prefetch_line(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
}

#endif  // cuda_shim.h defines these otherwise

constexpr int kLineBytes = 128;

// The block starts to copy `count` elements to shared memory and returns the address of the first.
// It is at most kVector<T> - 1 elements after `buffer` and aligned as `from` is, so that all
// elements but those at the ends are copied 16 bytes at a time.
template <typename T>
__device__ T* copy_row_async(T* buffer, const T* from, int count) {
  T* const to = buffer + (address(from) - address(buffer)) % 16 / sizeof(T);
  const int before = static_cast<int>((16 - address(from) % 16) % 16 / sizeof(T));
  const int head = before < count ? before : count;
  const int vectors = (count - head) / kVector<T>, ends = count - vectors * kVector<T>;
  for (int k = threadIdx.x; k < vectors; k += kThreads)
    copy_async(reinterpret_cast<Vector<T>*>(to + head) + k,
               reinterpret_cast<const Vector<T>*>(from + head) + k);
  const int end = threadIdx.x;
  if (end >= ends) return to;
  const int j = end < head ? end : end + vectors * kVector<T>;
  copy_async(to + j, from + j);
  return to;
}

// The block starts to read `count` elements into the L2 cache.
template <typename T>
__device__ void prefetch_row(const T* from, int count) {
  constexpr int kLine = kLineBytes / sizeof(T);
  for (int j = threadIdx.x * kLine; j < count; j += kThreads * kLine) prefetch_line(from + j);
}

}  // namespace imaml::cuda
