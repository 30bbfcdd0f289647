// cg_step_: one CG iteration of every row, given hp = H p.
//
//   Ap = hp + (lam + damping) p;   alpha = r.z / p.Ap;   x += alpha p;   r -= alpha Ap;
//   z = M^-1 r;   beta = new r.z / old r.z;   p = z + beta p;
//
// z is r without a preconditioner. Each row has its own alpha, beta, status.
//
// Bound by memory. Two forms:
//   one launch, a cluster of 1 to 16 blocks a row: p and Ap, later z, stay in the blocks' shared
//     memory: 4 reads and 3 writes per element, the floor; M^-1 is a fifth read. A row's sums are
//     exchanged through shared memory;
//   three launches, blocks_per_row(dim) blocks a row: 8 reads and 3 writes per element, with M^-1
//     two more reads. A row's sums go through `workspace`.
// cg_row_blocks chooses by the row's length and by what the device offers, never by the batch:
// clusters, which begin with compute capability 9.0, hold rows of up to 462,848 floats there; a
// block alone holds a short row on any device. A row's sums are added in a fixed order, nothing is
// read back to the host, no atomics: the same input on the same kind of device gives the same bits.
#pragma once
#include "cluster.cuh"

namespace imaml::cuda {

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

// ---- one launch ------------------------------------------------------------------------------

// A block's share of a row, where there are blocks enough.
constexpr int64_t kRowShare = 4096;

// Elements of each operand that a thread loads together, 64 bytes: what hides the latency.
template <typename T>
constexpr int kRowItems = 64 / sizeof(T);

// What a block keeps in shared memory besides its share of p and of Ap.
struct CgShared {
  double warp_sum[3 * kWarps];
  double sums[3 * kMaxCluster];
  double norms[2 * kMaxCluster];
};

// Elements of a row that one of its blocks works on. Whole warps: an aligned row stays aligned.
IMAML_INLINE int64_t cg_row_share(int64_t dim, int blocks) {
  const int64_t warps = (dim + int64_t{blocks} * kWarp - 1) / (int64_t{blocks} * kWarp);
  return warps * kWarp;
}

template <typename T>
int64_t cg_row_bytes(int64_t dim, int blocks) {
  return static_cast<int64_t>(sizeof(CgShared) + 2 * sizeof(T) * cg_row_share(dim, blocks));
}

// How many blocks a row's cluster has, or 0: three launches. Where the largest cluster cannot be
// had, the largest portable one may do.
template <typename T>
int cg_row_blocks(int64_t dim, const ClusterLimits& limits) {
  int wanted = 0;
  while (wanted + 1 < kClusterSizes && kRowShare << wanted < dim) ++wanted;
  for (int k = wanted; k >= 0 && (k == wanted || 1 << k == kPortableCluster); --k)
    if (cg_row_bytes<T>(dim, 1 << k) <= limits[k]) return 1 << k;
  return 0;
}

// Block `at.block` works on elements first + j, j < count, of the row, and each of its threads on
// the same ones in all three passes: what is kept needs no barrier.
template <bool kPreconditioned, typename T>
__global__ void __launch_bounds__(kThreads, 2) cg_row_kernel(CgArgs<T> a, int blocks) {
  const Place at(blocks);
  const std::int32_t status = a.status[at.row], steps = a.steps[at.row];
  const double rz_old = cg_old_rz(a, at.row);
  const bool records = at.block == 0 && threadIdx.x == 0;
  if (status != kRunning) {
    if (records) a.curvature[at.row] = a.beta[at.row] = 0;
    return;
  }
  cluster_arrive();
  const int share = static_cast<int>(cg_row_share(a.dim, blocks));
  const int64_t begin = at.block * share, first = at.row * a.dim + begin;
  const int count = static_cast<int>(begin + share < a.dim ? share : a.dim - begin);
  constexpr int kBatch = kRowItems<T>;
  CgShared& shared = *reinterpret_cast<CgShared*>(dynamic_shared());
  T* const kept_p = reinterpret_cast<T*>(&shared + 1);
  T* const kept_z = kept_p + share;  // Ap until r has moved

  double sum[3] = {};
  for (int start = threadIdx.x; start < count; start += kBatch * kThreads) {
    T p[kBatch] = {}, ap[kBatch] = {};
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int j = start + k * kThreads;
      if (j >= count) continue;
      p[k] = a.p[first + j];
      ap[k] = ap_at(a, first + j, begin + j);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int j = start + k * kThreads;
      if (j >= count) continue;
      kept_p[j] = p[k];
      kept_z[j] = ap[k];
      add_curvature(p[k], ap[k], sum);
    }
  }
  cluster_wait();  // every block has begun
  cluster_sum(sum, shared.warp_sum, shared.sums, blocks, at.block);
  const CgSums sums{sum[0], sum[1], sum[2]};
  const CgStep step = cg_step_length<T>(sums, rz_old, steps);

  double norm[kNorms<kPreconditioned>] = {};
  if (step.action != kFreeze)
    for (int start = threadIdx.x; start < count; start += kBatch * kThreads) {
      T x[kBatch] = {}, r[kBatch] = {}, inverse[kBatch] = {};
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int j = start + k * kThreads;
        if (j >= count) continue;
        x[k] = a.x[first + j];
        r[k] = a.r[first + j];
        if constexpr (kPreconditioned) inverse[k] = a.inverse[first + j];
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int j = start + k * kThreads;
        if (j >= count) continue;
        const T lam = step.action == kDropH ? a.lam[(begin + j) * a.lam_stride] : T(0);
        r[k] = cg_move(step, static_cast<T>(step.alpha), kept_p[j], kept_z[j], lam, x[k], r[k]);
        const T z = cg_z<kPreconditioned>(inverse, k, r[k]);
        kept_z[j] = z;
        a.x[first + j] = x[k];
        a.r[first + j] = r[k];
        add_norms(r[k], z, x[k], norm);
      }
    }
  cluster_sum(norm, shared.warp_sum, shared.norms, blocks, at.block);
  const CgNorms norms = norms_of(norm);
  const CgDirection next = cg_direction(step, norms, rz_old, a.tol2[at.row]);

  if (next.action == kAdvance)
    for (int j = threadIdx.x; j < count; j += kThreads)
      a.p[first + j] = static_cast<T>(next.beta) * kept_p[j] + kept_z[j];
  if (next.action == kClear)
    for (int j = threadIdx.x; j < count; j += kThreads) a.x[first + j] = T(0);
  // Every thread of every block has read the row's entries: cluster_sum has been passed.
  if (records) cg_record(a, at.row, sums, step, next, norms, rz_old);
}

// ---- three launches --------------------------------------------------------------------------

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

// ---- either ----------------------------------------------------------------------------------

template <typename T>
int cg_row_blocks(const CgArgs<T>& a) {
  const auto kernel = a.inverse == nullptr ? cg_row_kernel<false, T> : cg_row_kernel<true, T>;
  return cg_row_blocks<T>(a.dim, cluster_limits(reinterpret_cast<const void*>(kernel)));
}

// The doubles that cg_step wants for `workspace`, on the current device.
template <typename T>
int64_t cg_workspace(const CgArgs<T>& a) {
  if (a.rows == 0 || cg_row_blocks(a) != 0) return 0;
  return a.rows *
         (static_cast<int64_t>(sizeof(CgRow) / sizeof(double)) + blocks_per_row(a.dim) * 5);
}

template <bool kPreconditioned, typename T>
int cg_step_as(const CgArgs<T>& a, double* workspace, Stream stream) {
  if (const int blocks = cg_row_blocks(a); blocks != 0)
    return launch_clusters(cg_row_kernel<kPreconditioned, T>, a.rows, blocks,
                           cg_row_bytes<T>(a.dim, blocks), stream, a, blocks);
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

// `workspace` holds cg_workspace(a) doubles. Returns a cudaError_t.
template <typename T>
int cg_step(const CgArgs<T>& a, double* workspace, Stream stream) {
  if (a.rows == 0) return 0;
  return a.inverse == nullptr ? cg_step_as<false>(a, workspace, stream)
                              : cg_step_as<true>(a, workspace, stream);
}

}  // namespace imaml::cuda
