// prox_gd_, prox_adam_:  phi <- phi - rule(g),  g = grad + lam (phi - theta).
//
// Elementwise and bound by memory: reads phi, grad and theta (which all rows share, so it stays in
// cache) and writes phi; the rule also reads and writes its buffers: none, a velocity, or Adam's
// two moments. No reduction, so the launch shape cannot change the result.
#pragma once
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace imaml::cuda {

template <typename T, typename Rule>
__global__ void __launch_bounds__(kThreads)
    prox_step_kernel(ProxArgs<T> a, Rule rule, int64_t blocks) {
  const BlockCoord at(blocks);
  const int64_t base = at.row * a.dim;
  if (!prox_is_running(a, at.row)) return;
  // __restrict__: loads need not wait for stores.
  T* __restrict__ phi = a.phi + base;
  const T* __restrict__ grad = a.grad + base;
  const T* __restrict__ theta = a.theta;
  const T* __restrict__ lam = a.lam;
#pragma unroll 4
  for (int64_t i = at.first(); i < a.dim; i += at.stride(blocks)) {
    const T g = prox_gradient(phi[i], grad[i], theta[i], lam[i * a.lam_stride]);
    phi[i] -= rule(g, base + i);
  }
}

template <typename T, typename Rule>
int prox_step(const ProxArgs<T>& a, const Rule& rule, void* stream) {
  if (a.rows == 0 || a.dim == 0) return 0;
  const int64_t blocks = blocks_per_row(a.dim);
  return launch(prox_step_kernel<T, Rule>, a.rows * blocks, stream, a, rule, blocks);
}

}  // namespace imaml::cuda
