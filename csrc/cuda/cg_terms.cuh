// The terms of a CG iteration's sums, shared by its two forms (cg_step.cuh).
#pragma once
#include "cuda/device.cuh"

namespace imaml::cuda {

template <typename T>
__device__ T ap_at(const CgArgs<T>& a, int64_t at, int64_t i) {
  return cg_operator(a.hp[at], a.lam[i * a.lam_stride], a.damping, a.p[at]);
}

template <typename T>
__device__ void add_curvature(T p, T ap, double (&sum)[3]) {
  sum[0] += static_cast<double>(p) * static_cast<double>(ap);
  sum[1] += static_cast<double>(p) * static_cast<double>(p);
  sum[2] += static_cast<double>(ap) * static_cast<double>(ap);
}

// Sums over an updated residual: r.r and r.z, or one where the two are equal.
template <bool kPreconditioned>
constexpr int kNorms = kPreconditioned ? 2 : 1;

template <typename T, int N>
__device__ void add_norms(T r, T z, T x, double (&norm)[N]) {
  norm[0] += cg_residual(r, r, x);
  if constexpr (N == 2) norm[1] += cg_residual(r, z, x);
}

template <int N>
__device__ CgNorms norms_of(const double (&norm)[N]) {
  return {norm[0], norm[N - 1]};
}

}  // namespace imaml::cuda
