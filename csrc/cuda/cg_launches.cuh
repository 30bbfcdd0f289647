// A CG iteration in three launches, with blocks_per_row(dim) blocks per row; see cg_step.cuh. A
// row's sums go through a workspace in global memory.
#pragma once
#include "cuda/cg_terms.cuh"

namespace imaml::cuda {

// State of a row between launches. The caller's entries (rr, rz, status, steps) change only in the
// last launch, which reads their old values from here.
struct CgRow {
  double rz;
  CgSums sums;
  CgStep step;
  std::int32_t status;
  std::int32_t steps;
};

struct CgWorkspace {
  CgRow* row;      // [rows]
  double* sums;    // [rows, blocks, 3]
  double* norms;   // [rows, blocks, 1 or 2]: kNorms
  int64_t blocks;  // per row
};

static_assert(sizeof(CgRow) % sizeof(double) == 0);

// Reads p, hp.
template <typename T>
__global__ void __launch_bounds__(kThreads) cg_curvature_kernel(CgArgs<T> a, CgWorkspace w) {
  const BlockCoord at(w.blocks);
  const int64_t base = at.row * a.dim;
  if (at.block == 0 && threadIdx.x == 0) {
    w.row[at.row].rz = cg_old_rz(a, at.row);
    w.row[at.row].status = a.status[at.row];
    w.row[at.row].steps = a.steps[at.row];
  }
  if (a.status[at.row] != kRunning) return;
  double sum[3] = {};
  for (int64_t i = at.first(); i < a.dim; i += at.stride(w.blocks))
    add_curvature(a.p[base + i], ap_at(a, base + i, i), sum);
  block_sum(sum);
  if (threadIdx.x == 0) put_partials(sum, w.sums);
}

// Reads p, hp, x, r, M^-1; writes x, r.
template <bool kPreconditioned, typename T>
__global__ void __launch_bounds__(kThreads) cg_update_kernel(CgArgs<T> a, CgWorkspace w) {
  const BlockCoord at(w.blocks);
  const int64_t base = at.row * a.dim;
  CgRow& row = w.row[at.row];
  CgStep step{kFreeze, row.status, 0.0};
  if (row.status == kRunning) {
    double sum[3];
    sum_partials(w.sums + at.row * w.blocks * 3, w.blocks, sum);
    const CgSums sums{sum[0], sum[1], sum[2]};
    step = cg_step_length<T>(sums, row.rz, row.steps);
    if (at.block == 0 && threadIdx.x == 0) row.sums = sums;
  }
  if (at.block == 0 && threadIdx.x == 0) row.step = step;
  if (step.action == kFreeze) return;
  double norm[kNorms<kPreconditioned>] = {};
  for (int64_t i = at.first(); i < a.dim; i += at.stride(w.blocks)) {
    T x = a.x[base + i];
    const T r = cg_take_step(step, static_cast<T>(step.alpha), a.p[base + i], ap_at(a, base + i, i),
                             a.lam[i * a.lam_stride], x, a.r[base + i]);
    a.x[base + i] = x;
    a.r[base + i] = r;
    add_norms(r, cg_z<kPreconditioned>(a.inverse, base + i, r), x, norm);
  }
  block_sum(norm);
  if (threadIdx.x == 0) put_partials(norm, w.norms);
}

// Reads r, p, M^-1; writes p, and the row's entries.
template <bool kPreconditioned, typename T>
__global__ void __launch_bounds__(kThreads) cg_direction_kernel(CgArgs<T> a, CgWorkspace w) {
  const BlockCoord at(w.blocks);
  const int64_t base = at.row * a.dim;
  const CgRow& row = w.row[at.row];
  if (row.status != kRunning) {
    if (at.block == 0 && threadIdx.x == 0) a.curvature[at.row] = a.beta[at.row] = 0;
    return;
  }
  double norm[kNorms<kPreconditioned>] = {};
  if (row.step.action != kFreeze)
    sum_partials(w.norms + at.row * w.blocks * kNorms<kPreconditioned>, w.blocks, norm);
  const CgNorms norms = norms_of(norm);
  const CgDirection next = cg_direction(row.step, norms, row.rz, a.tol2[at.row]);
  if (next.action != kFreeze)
    for (int64_t i = at.first(); i < a.dim; i += at.stride(w.blocks)) {
      if (next.action == kAdvance)
        a.p[base + i] = static_cast<T>(next.beta) * a.p[base + i] +
                        cg_z<kPreconditioned>(a.inverse, base + i, a.r[base + i]);
      else
        a.x[base + i] = T(0);
    }
  if (at.block == 0 && threadIdx.x == 0)
    cg_record(a, at.row, row.sums, row.step, next, norms, row.rz);
}

// The doubles that a workspace for all rows holds.
template <typename T>
int64_t cg_launches_workspace(const CgArgs<T>& a) {
  return a.rows *
         (static_cast<int64_t>(sizeof(CgRow) / sizeof(double)) + blocks_per_row(a.dim) * 5);
}

template <bool kPreconditioned, typename T>
int cg_launches(const CgArgs<T>& a, double* workspace, void* stream) {
  CgWorkspace w;
  w.blocks = blocks_per_row(a.dim);
  w.row = reinterpret_cast<CgRow*>(workspace);
  w.sums = reinterpret_cast<double*>(w.row + a.rows);
  w.norms = w.sums + a.rows * w.blocks * 3;
  const int64_t blocks = a.rows * w.blocks;
  int error = launch(cg_curvature_kernel<T>, blocks, stream, a, w);
  if (error == 0) error = launch(cg_update_kernel<kPreconditioned, T>, blocks, stream, a, w);
  if (error == 0) error = launch(cg_direction_kernel<kPreconditioned, T>, blocks, stream, a, w);
  return error;
}

}  // namespace imaml::cuda
