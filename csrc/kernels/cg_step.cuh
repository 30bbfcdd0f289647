// cg_step_: one CG iteration of every row, given hp = H p.
//
//   Ap = hp + (lam + damping) p;   alpha = r.z / p.Ap;   x += alpha p;   r -= alpha Ap;
//   z = M^-1 r;   beta = new r.z / old r.z;   p = z + beta p;
//
// z is r without a preconditioner. Each row has its own alpha, beta, status.
//
// Bound by memory. Two forms, chosen by the row's length:
//   short rows (dim <= kRowDim): one block per row keeps p, Ap and r, later z, in registers: one
//     launch, 4 reads and 3 writes per element, the floor; M^-1 is a fifth read;
//   long rows: three launches, blocks_per_row(dim) blocks a row, 8 reads and 3 writes per element,
//     with M^-1 two more reads. A row's sums go through `workspace` and are added in a fixed order.
// Nothing is read back to the host, no atomics: the same input gives the same bits.
#pragma once
#include "device.cuh"

namespace imaml::cuda {

constexpr int kRowItems = 16;
constexpr int64_t kRowDim = kThreads * kRowItems;

// What the three launches tell each other about a row. The caller's own entries (rr, rz, status,
// steps) change only in the last launch, which reads them from here.
struct CgRow {
  double rz;
  CgSums sums;
  CgStep step;
  std::int32_t status;
  std::int32_t steps;
};

struct CgWorkspace {
  CgRow* row;     // [rows]
  double* sums;   // [rows, blocks, 3]
  double* norms;  // [rows, blocks, 1 or 2]: kNorms
  int64_t blocks;
};

static_assert(sizeof(CgRow) % sizeof(double) == 0);

inline int64_t cg_workspace_doubles(int64_t rows, int64_t dim) {
  if (dim <= kRowDim) return 0;
  return rows * (static_cast<int64_t>(sizeof(CgRow) / sizeof(double)) + blocks_per_row(dim) * 5);
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

// An updated residual has two sums, r.r and r.z, or one where they are the same number.
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

// ---- short rows: one block, one launch -------------------------------------------------------

template <bool kPreconditioned, typename T>
__global__ void __launch_bounds__(kThreads) cg_row_kernel(CgArgs<T> a) {
  const int64_t row = blockIdx.x, base = row * a.dim;
  const std::int32_t status = a.status[row], steps = a.steps[row];
  const double rz_old = cg_old_rz(a, row);
  if (status != kRunning) {
    if (threadIdx.x == 0) a.curvature[row] = a.beta[row] = 0;
    return;
  }
  T p[kRowItems], ap[kRowItems], z[kRowItems];  // z is r until the row has moved
  double sum[3] = {};
#pragma unroll
  for (int k = 0; k < kRowItems; ++k) {
    const int64_t i = threadIdx.x + int64_t{k} * kThreads;
    if (i >= a.dim) continue;
    p[k] = a.p[base + i];
    ap[k] = ap_at(a, base + i, i);
    z[k] = a.r[base + i];
    add_curvature(p[k], ap[k], sum);
  }
  block_sum(sum);
  const CgSums sums{sum[0], sum[1], sum[2]};
  const CgStep step = cg_step_length<T>(sums, rz_old, steps);
  double norm[kNorms<kPreconditioned>] = {};
  if (step.action != kFreeze) {
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      const int64_t i = threadIdx.x + int64_t{k} * kThreads;
      if (i >= a.dim) continue;
      T x = a.x[base + i];
      const T r =
          cg_move(step, static_cast<T>(step.alpha), p[k], ap[k], a.lam[i * a.lam_stride], x, z[k]);
      z[k] = cg_z<kPreconditioned>(a.inverse, base + i, r);
      a.x[base + i] = x;
      a.r[base + i] = r;
      add_norms(r, z[k], x, norm);
    }
  }
  block_sum(norm);
  const CgNorms norms = norms_of(norm);
  const CgDirection next = cg_direction(step, norms, rz_old, a.tol2[row]);
  if (next.action != kFreeze) {
    const T beta = static_cast<T>(next.beta);
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      const int64_t i = threadIdx.x + int64_t{k} * kThreads;
      if (i >= a.dim) continue;
      if (next.action == kAdvance)
        a.p[base + i] = beta * p[k] + z[k];
      else
        a.x[base + i] = T(0);
    }
  }
  // Every thread has read the row's entries: block_sum has been passed.
  if (threadIdx.x == 0) cg_record(a, row, sums, step, next, norms, rz_old);
}

// ---- long rows: three launches ---------------------------------------------------------------

// Reads p, hp.
template <typename T>
__global__ void __launch_bounds__(kThreads) cg_curvature_kernel(CgArgs<T> a, CgWorkspace w) {
  const Place at(w.blocks);
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
  const Place at(w.blocks);
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
    const T r = cg_move(step, static_cast<T>(step.alpha), a.p[base + i], ap_at(a, base + i, i),
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
  const Place at(w.blocks);
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

template <bool kPreconditioned, typename T>
int cg_step_as(const CgArgs<T>& a, double* workspace, Stream stream) {
  if (a.dim <= kRowDim) return launch(cg_row_kernel<kPreconditioned, T>, a.rows, stream, a);
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

// `workspace` holds cg_workspace_doubles(rows, dim). Returns a cudaError_t.
template <typename T>
int cg_step(const CgArgs<T>& a, double* workspace, Stream stream) {
  if (a.rows == 0) return 0;
  return a.inverse == nullptr ? cg_step_as<false>(a, workspace, stream)
                              : cg_step_as<true>(a, workspace, stream);
}

}  // namespace imaml::cuda
