// prox_gd_, prox_adam_:  phi <- phi - rule(g),  g = grad + lam (phi - theta).
//
// Elementwise and bound by memory: reads phi, grad and theta (which all rows share, so it stays in
// cache) and writes phi; the rule also reads and writes its buffers: none, a velocity, or Adam's
// two moments. A thread works on kProxItems vectors of 16 bytes, and reads all of them before it
// writes. Vectors are aligned in memory: the first and the last of a row may be incomplete. No
// reduction, so neither the launch shape nor the alignment can change the result.
#pragma once
#include "cuda/launch.h"
#include "cuda/vector.cuh"

namespace imaml::cuda {

constexpr int kProxItems = 2;
constexpr int kProxSlots = kThreads * kProxItems;  // vectors per block

// The buffers that a rule uses: Descent none or a velocity.
template <typename T>
__device__ T* get_buffer(const Descent<T>& rule, int) {
  return rule.velocity;
}
template <typename T>
__device__ T* get_buffer(const Adam<T>& rule, int n) {
  return n == 0 ? rule.m : rule.v;
}

// The same rule on other buffers.
template <int kBuffers, typename T>
__device__ Descent<T> with_buffers(Descent<T> rule, T* first, T*) {
  rule.velocity = kBuffers == 0 ? nullptr : first;
  return rule;
}
template <int kBuffers, typename T>
__device__ Adam<T> with_buffers(Adam<T> rule, T* first, T* second) {
  rule.m = first;
  rule.v = second;
  return rule;
}

// An index in the row, relative to a vector, as one in the vector.
template <typename T>
__device__ int clip(int64_t element) {
  return element < 0 ? 0 : element < kVector<T> ? static_cast<int>(element) : kVector<T>;
}

template <bool kWide, typename T>
__device__ Vector<T> read_vector(const T* from, int begin, int end) {
  Vector<T> read{};
  if constexpr (kWide) {
    read = *reinterpret_cast<const Vector<T>*>(from);
  } else {
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k)
      if (begin <= k && k < end) read.of[k] = from[k];
  }
  return read;
}

template <bool kWide, typename T>
__device__ void write_vector(T* to, const Vector<T>& values, int begin, int end) {
  if constexpr (kWide) {
    *reinterpret_cast<Vector<T>*>(to) = values;
  } else {
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k)
      if (begin <= k && k < end) to[k] = values.of[k];
  }
}

// Works on the vectors at elements i, i + kThreads * kVector<T>, ... of a row. kWide: all of them
// are complete, and aligned in all operands of the size of phi.
template <int kBuffers, bool kWide, typename T, typename Rule>
__device__ void prox_vectors(const ProxArgs<T>& a, const Rule& rule, int64_t row, int64_t i) {
  constexpr int64_t kStep = kThreads * kVector<T>;
  const int64_t base = row * a.dim;
  const bool diagonal = a.lam_stride != 0;
  const bool aligned_theta = kWide && is_aligned(a.theta + i);
  const bool aligned_lam = kWide && is_aligned(a.lam + i);
  const auto begin = [&](int k) { return kWide ? 0 : clip<T>(-i - k * kStep); };
  const auto end = [&](int k) { return kWide ? kVector<T> : clip<T>(a.dim - i - k * kStep); };
  const auto read = [&](const T* from, bool wide, int k) {
    return wide ? read_vector<true>(from + k * kStep, 0, 0)
                : read_vector<false>(from + k * kStep, begin(k), end(k));
  };
  Vector<T> phi[kProxItems], grad[kProxItems], theta[kProxItems], lam[kProxItems],
      buffer[2][kProxItems];
#pragma unroll
  for (int k = 0; k < kProxItems; ++k) {
    phi[k] = read(a.phi + base + i, kWide, k);
    grad[k] = read(a.grad + base + i, kWide, k);
    for (int n = 0; n < kBuffers; ++n)
      buffer[n][k] = read(get_buffer(rule, n) + base + i, kWide, k);
    theta[k] = read(a.theta + i, aligned_theta, k);
    if (diagonal)
      lam[k] = read(a.lam + i, aligned_lam, k);
    else
      for (T& one : lam[k].of) one = a.lam[0];
  }
#pragma unroll
  for (int k = 0; k < kProxItems; ++k) {
    const Rule own = with_buffers<kBuffers>(rule, buffer[0][k].of, buffer[1][k].of);
#pragma unroll
    for (int c = 0; c < kVector<T>; ++c) {
      const T g = prox_gradient(phi[k].of[c], grad[k].of[c], theta[k].of[c], lam[k].of[c]);
      phi[k].of[c] -= own(g, c);
    }
    write_vector<kWide>(a.phi + base + i + k * kStep, phi[k], begin(k), end(k));
    for (int n = 0; n < kBuffers; ++n)
      write_vector<kWide>(get_buffer(rule, n) + base + i + k * kStep, buffer[n][k], begin(k),
                          end(k));
  }
}

template <int kBuffers, typename T, typename Rule>
__global__ void __launch_bounds__(kThreads)
    prox_step_kernel(ProxArgs<T> a, Rule rule, int64_t blocks) {
  const BlockCoord at(blocks);
  if (!prox_is_running(a, at.row)) return;
  const T* const row = a.phi + at.row * a.dim;
  const int64_t slot = at.block * kProxSlots + threadIdx.x;
  const int64_t i = slot * kVector<T> - static_cast<int64_t>(address(row) % 16 / sizeof(T));
  bool wide = i >= 0 && i + ((kProxItems - 1) * kThreads + 1) * kVector<T> <= a.dim &&
              is_aligned(a.grad + at.row * a.dim + i);
  for (int n = 0; n < kBuffers; ++n)
    wide = wide && is_aligned(get_buffer(rule, n) + at.row * a.dim + i);
  if (wide)
    prox_vectors<kBuffers, true>(a, rule, at.row, i);
  else
    prox_vectors<kBuffers, false>(a, rule, at.row, i);
}

template <int kBuffers, typename T, typename Rule>
int prox_step_with(const ProxArgs<T>& a, const Rule& rule, void* stream) {
  // A row may begin within a vector.
  constexpr int64_t kBlock = kProxSlots * kVector<T>;
  const int64_t blocks = (a.dim + kVector<T> - 1 + kBlock - 1) / kBlock;
  return launch(prox_step_kernel<kBuffers, T, Rule>, a.rows * blocks, stream, a, rule, blocks);
}

template <typename T>
int prox_step_as(const ProxArgs<T>& a, const Descent<T>& rule, void* stream) {
  return rule.velocity == nullptr ? prox_step_with<0>(a, rule, stream)
                                  : prox_step_with<1>(a, rule, stream);
}
template <typename T>
int prox_step_as(const ProxArgs<T>& a, const Adam<T>& rule, void* stream) {
  return prox_step_with<2>(a, rule, stream);
}

template <typename T, typename Rule>
int prox_step(const ProxArgs<T>& a, const Rule& rule, void* stream) {
  return a.rows == 0 || a.dim == 0 ? 0 : prox_step_as(a, rule, stream);
}

}  // namespace imaml::cuda
