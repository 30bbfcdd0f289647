// prox_gd_:  phi <- phi - lr d,  d = grad + lam (phi - theta)  or its momentum form.
//
// Elementwise and bound by memory: reads phi, grad and theta (which stays in cache, being shared by
// all rows) and writes phi, with momentum also one read and one write of the velocity. No
// reduction, so the launch shape cannot change the result.
#pragma once
#include "device.cuh"

namespace imaml::cuda {

template <typename T>
__global__ void __launch_bounds__(kThreads) prox_gd_kernel(ProxArgs<T> a, int64_t blocks) {
  const Place at(blocks);
  const int64_t base = at.row * a.dim;
  if (a.status != nullptr && a.status[at.row] != kRunning) return;
  for (int64_t i = at.first(); i < a.dim; i += at.stride(blocks)) {
    const T phi = a.phi[base + i];
    T d = prox_gradient(phi, a.grad[base + i], a.theta[i], a.lam[i * a.lam_stride]);
    if (a.velocity != nullptr)
      d = momentum_direction(d, a.momentum, a.nesterov, a.velocity[base + i]);
    a.phi[base + i] = phi - a.lr * d;
  }
}

template <typename T>
int prox_gd(const ProxArgs<T>& a, Stream stream) {
  if (a.rows == 0 || a.dim == 0) return 0;
  const int64_t blocks = blocks_per_row(a.dim);
  return launch(prox_gd_kernel<T>, a.rows * blocks, stream, a, blocks);
}

}  // namespace imaml::cuda
