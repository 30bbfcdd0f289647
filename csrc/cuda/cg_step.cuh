// cg_step_: one CG iteration of every row, given hp = H p.
//
//   Ap = hp + (lam + damping) p;   alpha = r.z / p.Ap;   x += alpha p;   r -= alpha Ap;
//   z = M^-1 r;   beta = new r.z / old r.z;   p = z + beta p;
//
// z is r without a preconditioner. Each row has its own alpha, beta and status.
//
// Bound by memory. Two forms:
//   one launch, with a cluster of 1 to 16 blocks per row (cg_cluster.cuh): 4 reads and 3 writes per
//     element, the minimum; M^-1 is a fifth read;
//   three launches (cg_launches.cuh): 8 reads and 3 writes per element; M^-1 adds two reads.
// The row's length and the device determine which, never the batch. Clusters need compute
// capability 9.0 and hold rows of up to 462,848 floats there; a single block holds a short row on
// any device.
//
// The batch determines how many blocks a row gets, so that all rows run at the same time if
// possible, but it does not change any bit. Nothing is read back to the host, and there are no
// atomics: the same input gives the same bits on the same kind of device.
#pragma once
#include "cuda/cg_cluster.cuh"
#include "cuda/cg_launches.cuh"
#include "cuda/launch.h"

namespace imaml::cuda {

template <bool kPreconditioned, typename T>
int cg_capacity(int blocks, int64_t bytes) {
  const auto kernel = cg_row_kernel<kPreconditioned, T>;
  return cluster_capacity(reinterpret_cast<const void*>(kernel), blocks, bytes);
}

template <typename T>
CgForm cg_form(const CgArgs<T>& a) {
  return cg_form<T>(a.rows, a.dim,
                    a.inverse == nullptr ? cg_capacity<false, T> : cg_capacity<true, T>);
}

template <typename T>
CgOccupancy cg_occupancy(int64_t rows, int64_t dim) {
  CgOccupancy found{cg_form<T>(rows, dim, cg_capacity<false, T>).blocks, {}};
  CgForm form{cg_shares(dim), 1};
  for (int k = 0; k < kClusterSizes && form.blocks <= form.shares; ++k, form.blocks *= 2)
    found.concurrent_rows[k] = cg_capacity<false, T>(form.blocks, form.shared_bytes<T>(dim));
  return found;
}

template <typename T>
int64_t cg_workspace(const CgArgs<T>& a) {
  return a.rows == 0 || cg_form(a).blocks != 0 ? 0 : cg_launches_workspace(a);
}

template <bool kPreconditioned, typename T>
int cg_step_as(const CgArgs<T>& a, double* workspace, void* stream) {
  const CgForm form = cg_form(a);
  if (form.blocks == 0) return cg_launches<kPreconditioned>(a, workspace, stream);
  return launch_clusters(cg_row_kernel<kPreconditioned, T>, a.rows, form.blocks,
                         form.shared_bytes<T>(a.dim), stream, a, form.shares, form.blocks);
}

template <typename T>
int cg_step(const CgArgs<T>& a, double* workspace, void* stream) {
  if (a.rows == 0) return 0;
  return a.inverse == nullptr ? cg_step_as<false>(a, workspace, stream)
                              : cg_step_as<true>(a, workspace, stream);
}

}  // namespace imaml::cuda
