// cg_step_: one CG iteration of every row, given hp = H p.
//
//   Ap = hp + (lam + damping) p;   alpha = r.r / p.Ap;   x += alpha p;   r -= alpha Ap;
//   beta = new r.r / old r.r;      p = r + beta p;       each row with its own alpha, beta, status.
//
// Bound by memory. Two forms, chosen by the row's length:
//   short rows (dim <= kRowDim): one block per row keeps p, Ap and r in registers: one launch,
//     4 reads and 3 writes per element, the floor;
//   long rows: three launches, blocks_per_row(dim) blocks a row, 8 reads and 3 writes per element.
//     A row's sums go through `workspace` and are added in a fixed order.
// Nothing is read back to the host, no atomics: the same input gives the same bits.
#pragma once
#include "device.cuh"

namespace imaml::cuda {

constexpr int kRowItems = 16;
constexpr int64_t kRowDim = kThreads * kRowItems;

// What the three launches tell each other about a row. The caller's own entries (rr, status, steps)
// change only in the last launch, which reads them from here.
struct CgRow {
  double rr;
  CgSums sums;
  CgStep step;
  std::int32_t status;
  std::int32_t steps;
};

struct CgWorkspace {
  CgRow* row;    // [rows]
  double* sums;  // [rows, blocks, 3]
  double* rr;    // [rows, blocks]
  int64_t blocks;
};

static_assert(sizeof(CgRow) % sizeof(double) == 0);

inline int64_t cg_workspace_doubles(int64_t rows, int64_t dim) {
  if (dim <= kRowDim) return 0;
  return rows * (static_cast<int64_t>(sizeof(CgRow) / sizeof(double)) + blocks_per_row(dim) * 4);
}

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

// ---- short rows: one block, one launch -------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads) cg_row_kernel(CgArgs<T> a) {
  const int64_t row = blockIdx.x, base = row * a.dim;
  const std::int32_t status = a.status[row], steps = a.steps[row];
  const double rr_old = a.rr[row];
  if (status != kRunning) {
    if (threadIdx.x == 0) a.curvature[row] = a.beta[row] = 0;
    return;
  }
  T p[kRowItems], ap[kRowItems], r[kRowItems];
  double sum[3] = {};
#pragma unroll
  for (int k = 0; k < kRowItems; ++k) {
    const int64_t i = threadIdx.x + int64_t{k} * kThreads;
    if (i >= a.dim) continue;
    p[k] = a.p[base + i];
    ap[k] = ap_at(a, base + i, i);
    r[k] = a.r[base + i];
    add_curvature(p[k], ap[k], sum);
  }
  block_sum(sum);
  const CgSums sums{sum[0], sum[1], sum[2]};
  const CgStep step = cg_step_length<T>(sums, rr_old, steps);
  double rr_new[1] = {};
  if (step.action != kFreeze) {
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      const int64_t i = threadIdx.x + int64_t{k} * kThreads;
      if (i >= a.dim) continue;
      T x = a.x[base + i];
      r[k] =
          cg_move(step, static_cast<T>(step.alpha), p[k], ap[k], a.lam[i * a.lam_stride], x, r[k]);
      a.x[base + i] = x;
      a.r[base + i] = r[k];
      rr_new[0] += cg_residual(r[k], x);
    }
  }
  block_sum(rr_new);
  const CgDirection next = cg_direction(step, rr_new[0], rr_old, a.tol2[row]);
  if (next.action != kFreeze) {
    const T beta = static_cast<T>(next.beta);
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      const int64_t i = threadIdx.x + int64_t{k} * kThreads;
      if (i >= a.dim) continue;
      if (next.action == kAdvance)
        a.p[base + i] = r[k] + beta * p[k];
      else
        a.x[base + i] = T(0);
    }
  }
  // Every thread has read the row's entries: block_sum has been passed.
  if (threadIdx.x == 0) cg_record(a, row, sums, step, next, rr_new[0], rr_old);
}

// ---- long rows: three launches ---------------------------------------------------------------

// Reads p, hp.
template <typename T>
__global__ void __launch_bounds__(kThreads) cg_curvature_kernel(CgArgs<T> a, CgWorkspace w) {
  const Place at(w.blocks);
  const int64_t base = at.row * a.dim;
  if (at.block == 0 && threadIdx.x == 0) {
    w.row[at.row].rr = a.rr[at.row];
    w.row[at.row].status = a.status[at.row];
    w.row[at.row].steps = a.steps[at.row];
  }
  if (a.status[at.row] != kRunning) return;
  double sum[3] = {};
  for (int64_t i = at.first(); i < a.dim; i += at.stride(w.blocks))
    add_curvature(a.p[base + i], ap_at(a, base + i, i), sum);
  block_sum(sum);
  if (threadIdx.x == 0)
    for (int k = 0; k < 3; ++k) w.sums[blockIdx.x * int64_t{3} + k] = sum[k];
}

// Reads p, hp, x, r; writes x, r.
template <typename T>
__global__ void __launch_bounds__(kThreads) cg_update_kernel(CgArgs<T> a, CgWorkspace w) {
  const Place at(w.blocks);
  const int64_t base = at.row * a.dim;
  CgRow& row = w.row[at.row];
  CgStep step{kFreeze, row.status, 0.0};
  if (row.status == kRunning) {
    double sum[3];
    sum_partials(w.sums + at.row * w.blocks * 3, w.blocks, sum);
    const CgSums sums{sum[0], sum[1], sum[2]};
    step = cg_step_length<T>(sums, row.rr, row.steps);
    if (at.block == 0 && threadIdx.x == 0) row.sums = sums;
  }
  if (at.block == 0 && threadIdx.x == 0) row.step = step;
  if (step.action == kFreeze) return;
  double rr[1] = {};
  for (int64_t i = at.first(); i < a.dim; i += at.stride(w.blocks)) {
    T x = a.x[base + i];
    const T r = cg_move(step, static_cast<T>(step.alpha), a.p[base + i], ap_at(a, base + i, i),
                        a.lam[i * a.lam_stride], x, a.r[base + i]);
    a.x[base + i] = x;
    a.r[base + i] = r;
    rr[0] += cg_residual(r, x);
  }
  block_sum(rr);
  if (threadIdx.x == 0) w.rr[blockIdx.x] = rr[0];
}

// Reads r, p; writes p, and the row's entries.
template <typename T>
__global__ void __launch_bounds__(kThreads) cg_direction_kernel(CgArgs<T> a, CgWorkspace w) {
  const Place at(w.blocks);
  const int64_t base = at.row * a.dim;
  const CgRow& row = w.row[at.row];
  if (row.status != kRunning) {
    if (at.block == 0 && threadIdx.x == 0) a.curvature[at.row] = a.beta[at.row] = 0;
    return;
  }
  double rr_new[1] = {row.rr};
  if (row.step.action != kFreeze) sum_partials(w.rr + at.row * w.blocks, w.blocks, rr_new);
  const CgDirection next = cg_direction(row.step, rr_new[0], row.rr, a.tol2[at.row]);
  if (next.action != kFreeze)
    for (int64_t i = at.first(); i < a.dim; i += at.stride(w.blocks)) {
      if (next.action == kAdvance)
        a.p[base + i] = a.r[base + i] + static_cast<T>(next.beta) * a.p[base + i];
      else
        a.x[base + i] = T(0);
    }
  if (at.block == 0 && threadIdx.x == 0)
    cg_record(a, at.row, row.sums, row.step, next, rr_new[0], row.rr);
}

// `workspace` holds cg_workspace_doubles(rows, dim). Returns a cudaError_t.
template <typename T>
int cg_step(const CgArgs<T>& a, double* workspace, Stream stream) {
  if (a.rows == 0) return 0;
  if (a.dim <= kRowDim) return launch(cg_row_kernel<T>, a.rows, stream, a);
  CgWorkspace w;
  w.blocks = blocks_per_row(a.dim);
  w.row = reinterpret_cast<CgRow*>(workspace);
  w.sums = reinterpret_cast<double*>(w.row + a.rows);
  w.rr = w.sums + a.rows * w.blocks * 3;
  int error = launch(cg_curvature_kernel<T>, a.rows * w.blocks, stream, a, w);
  if (error == 0) error = launch(cg_update_kernel<T>, a.rows * w.blocks, stream, a, w);
  if (error == 0) error = launch(cg_direction_kernel<T>, a.rows * w.blocks, stream, a, w);
  return error;
}

}  // namespace imaml::cuda
