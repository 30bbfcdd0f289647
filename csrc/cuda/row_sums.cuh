// row_dot and prox_norms: N sums per row, in float64, in one launch for short rows and two for
// long ones.
//
// Bound by memory: each operand is read once. A block sums its part of a row; one block per row
// adds the parts in order. No atomics: the same input gives the same bits.
#pragma once
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace imaml::cuda {

// The terms of a.b.
template <typename T>
struct Dot {
  static constexpr int kSums = 1;
  const T* a;
  const T* b;
  int64_t rows;
  int64_t dim;

  __device__ void add(int64_t base, int64_t i, double (&sum)[1]) const {
    sum[0] += static_cast<double>(a[base + i]) * static_cast<double>(b[base + i]);
  }
};

// The terms of |grad + lam (phi - theta)|^2 and of (phi - theta)' diag(lam) (phi - theta).
template <typename T>
struct ProxNorms {
  static constexpr int kSums = 2;
  ProxArgs<T> args;
  int64_t rows;
  int64_t dim;

  __device__ void add(int64_t base, int64_t i, double (&sum)[2]) const {
    const T lam = args.lam[i * args.lam_stride], phi = args.phi[base + i];
    const T g = prox_gradient(phi, args.grad[base + i], args.theta[i], lam);
    const T displacement = phi - args.theta[i];
    sum[0] += static_cast<double>(g) * static_cast<double>(g);
    sum[1] += static_cast<double>(lam) *
              (static_cast<double>(displacement) * static_cast<double>(displacement));
  }
};

template <typename Terms>
__global__ void __launch_bounds__(kThreads)
    row_sums_kernel(Terms terms, double* partial, int64_t blocks) {
  const BlockCoord at(blocks);
  double sum[Terms::kSums] = {};
  for (int64_t i = at.first(); i < terms.dim; i += at.stride(blocks))
    terms.add(at.row * terms.dim, i, sum);
  block_sum(sum);
  if (threadIdx.x == 0) put_partials(sum, partial);
}

template <int N>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const double* partial, double* out, int64_t blocks) {
  const int64_t row = blockIdx.x;
  double total[N];
  sum_partials(partial + row * blocks * N, blocks, total);
  if (threadIdx.x == 0)
    for (int k = 0; k < N; ++k) out[row * N + k] = total[k];
}

template <int kSums>
int64_t row_sums_workspace(int64_t rows, int64_t dim) {
  const int64_t blocks = blocks_per_row(dim);
  return blocks == 1 ? 0 : rows * blocks * kSums;
}

// `out` is [rows, Terms::kSums]; `workspace` holds row_sums_workspace<kSums>(...) doubles.
template <typename Terms>
int row_sums(const Terms& terms, double* out, double* workspace, void* stream) {
  if (terms.rows == 0) return 0;
  const int64_t blocks = blocks_per_row(terms.dim);
  double* partial = blocks == 1 ? out : workspace;
  const int error =
      launch(row_sums_kernel<Terms>, terms.rows * blocks, stream, terms, partial, blocks);
  if (error != 0 || blocks == 1) return error;
  return launch(add_parts_kernel<Terms::kSums>, terms.rows, stream,
                static_cast<const double*>(workspace), out, blocks);
}

template <typename T>
int prox_norms(const ProxArgs<T>& a, double* out, double* workspace, void* stream) {
  return row_sums(ProxNorms<T>{a, a.rows, a.dim}, out, workspace, stream);
}

template <typename T>
int row_dot(const T* a, const T* b, double* out, double* workspace, int64_t rows, int64_t dim,
            void* stream) {
  return row_sums(Dot<T>{a, b, rows, dim}, out, workspace, stream);
}

}  // namespace imaml::cuda
