// Accesses of 16 bytes, the widest of a thread.
#pragma once
#include "cuda/device.cuh"

namespace imaml::cuda {

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T>
struct alignas(16) Vector {
  T of[kVector<T>];
};

IMAML_INLINE bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

}  // namespace imaml::cuda
