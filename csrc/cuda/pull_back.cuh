// pull_back: two sums over the rows for every column.
//
// Bound by memory: reads x and phi once. A thread adds up a column, in the order of the rows, in
// float64; neighbouring threads read neighbouring elements. No atomics: the launch shape cannot
// change the result.
#pragma once
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace imaml::cuda {

template <typename T>
__global__ void __launch_bounds__(kThreads) pull_back_kernel(PullBackArgs<T> a) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.dim) return;
  const T theta = a.theta[i], weight = a.weight[0];
  double sum = 0, product = 0;
#pragma unroll 4
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t at = row * a.dim + i;
    const PullBackTerms<T> terms(a.use[row], a.x[at], a.phi[at], theta, weight);
    sum += terms.x;
    product += terms.product;
  }
  a.sums[i] = static_cast<T>(sum);
  a.sums[a.dim + i] = static_cast<T>(product);
}

template <typename T>
int pull_back(const PullBackArgs<T>& a, void* stream) {
  if (a.dim == 0) return 0;
  return launch(pull_back_kernel<T>, (a.dim + kThreads - 1) / kThreads, stream, a);
}

}  // namespace imaml::cuda
