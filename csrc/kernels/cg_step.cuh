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
// The row's length and the device decide which, never the batch: clusters, which begin with compute
// capability 9.0, hold rows of up to 462,848 floats there; a block alone holds a short row on any
// device.
//
// The batch decides into how many blocks a row goes, so that all rows run at a time if they can.
// It does not decide about any bit: a row is cut into cg_shares(dim) shares, of which a block takes
// one or a few; each is summed by itself, and the sums are added in the order of the shares.
// Nothing is read back to the host, no atomics: the same input gives the same bits on the same kind
// of device.
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

// A share of a row, where the row is worth more than one.
constexpr int64_t kRowShare = 4096;

// Shares that one block may take, one after the other.
constexpr int kBlockShares = 4;

// Elements of each operand that a thread loads together, 64 bytes: what hides the latency.
template <typename T>
constexpr int kRowItems = 64 / sizeof(T);

// What a block keeps in shared memory besides its shares of p and of Ap.
struct CgShared {
  double warp_sum[3 * kWarps];
  double sums[3 * kMaxCluster];
  double norms[2 * kMaxCluster];
};

inline int cg_shares(int64_t dim) {
  int shares = 1;
  while (shares < kMaxCluster && kRowShare * shares < dim) shares *= 2;
  return shares;
}

// Elements of a share. Whole warps: an aligned row stays aligned.
IMAML_INLINE int64_t cg_share_length(int64_t dim, int shares) {
  const int64_t warps = (dim + int64_t{shares} * kWarp - 1) / (int64_t{shares} * kWarp);
  return warps * kWarp;
}

// How a row is worked on. No blocks: in three launches.
struct CgForm {
  int shares;
  int blocks;

  int block_shares() const { return shares / blocks; }
  template <typename T>
  int64_t shared_bytes(int64_t dim) const {
    const int64_t kept = 2 * block_shares() * cg_share_length(dim, shares);
    return static_cast<int64_t>(sizeof(CgShared) + sizeof(T) * kept);
  }
};

// The number of blocks with which all rows are done soonest, each block taking time for its shares,
// and as many clusters running at a time as `capacity(blocks, bytes)` says. Of equals the fewest:
// they want the least room.
template <typename T, typename Capacity>
CgForm cg_form(int64_t rows, int64_t dim, const Capacity& capacity) {
  CgForm best{cg_shares(dim), 0};
  int64_t best_time = 0;
  for (CgForm form{best.shares, 1}; form.blocks <= form.shares; form.blocks *= 2) {
    if (form.block_shares() > kBlockShares) continue;
    const int64_t clusters = capacity(form.blocks, form.shared_bytes<T>(dim));
    if (clusters == 0) continue;
    const int64_t time = (rows + clusters - 1) / clusters * form.block_shares();
    if (best.blocks == 0 || time < best_time) {
      best = form;
      best_time = time;
    }
  }
  return best;
}

// Share `number` of a row, and where a block keeps what it has of it.
struct CgShare {
  int64_t begin;  // in the row
  int64_t first;  // in the operands
  int count;
  int kept;

  __device__ CgShare(int64_t dim, int64_t row, int64_t number, int64_t length, int kept_before)
      : begin(number * length),
        first(row * dim + begin),
        count(static_cast<int>(begin + length < dim ? length : dim - begin)),
        kept(static_cast<int>(kept_before * length)) {}
};

// Each thread works on the same elements in all three passes: what is kept needs no barrier.
template <bool kPreconditioned, typename T>
__global__ void __launch_bounds__(kThreads, 2) cg_row_kernel(CgArgs<T> a, int shares, int blocks) {
  const Place at(blocks);
  const std::int32_t status = a.status[at.row], steps = a.steps[at.row];
  const double rz_old = cg_old_rz(a, at.row);
  const bool records = at.block == 0 && threadIdx.x == 0;
  if (status != kRunning) {
    if (records) a.curvature[at.row] = a.beta[at.row] = 0;
    return;
  }
  cluster_arrive_relaxed();
  constexpr int kBatch = kRowItems<T>;
  const int own = shares / blocks;
  const int64_t length = cg_share_length(a.dim, shares);
  const auto share = [&](int k) { return CgShare(a.dim, at.row, at.block * own + k, length, k); };
  CgShared& shared = *reinterpret_cast<CgShared*>(dynamic_shared());
  T* const kept_p = reinterpret_cast<T*>(&shared + 1);
  T* const kept_z = kept_p + own * length;  // Ap until r has moved

  double sum[3];
  for (int n = 0; n < own; ++n) {
    const CgShare part = share(n);
    for (double& one : sum) one = 0;
    for (int start = threadIdx.x; start < part.count; start += kBatch * kThreads) {
      T p[kBatch] = {}, ap[kBatch] = {};
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int j = start + k * kThreads;
        if (j >= part.count) continue;
        p[k] = a.p[part.first + j];
        ap[k] = ap_at(a, part.first + j, part.begin + j);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int j = start + k * kThreads;
        if (j >= part.count) continue;
        kept_p[part.kept + j] = p[k];
        kept_z[part.kept + j] = ap[k];
        add_curvature(p[k], ap[k], sum);
      }
    }
    block_sum(sum, shared.warp_sum);
    if (n == 0) cluster_wait();  // every block has begun
    send_sums(sum, shared.sums, blocks, at.block * own + n);
  }
  cluster_sync(blocks);
  add_shares(sum, shared.sums, shares);
  const CgSums sums{sum[0], sum[1], sum[2]};
  const CgStep step = cg_step_length<T>(sums, rz_old, steps);

  double norm[kNorms<kPreconditioned>] = {};
  if (step.action != kFreeze) {
    for (int n = 0; n < own; ++n) {
      const CgShare part = share(n);
      for (double& one : norm) one = 0;
      for (int start = threadIdx.x; start < part.count; start += kBatch * kThreads) {
        T x[kBatch] = {}, r[kBatch] = {}, inverse[kBatch] = {};
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int j = start + k * kThreads;
          if (j >= part.count) continue;
          x[k] = a.x[part.first + j];
          r[k] = a.r[part.first + j];
          if constexpr (kPreconditioned) inverse[k] = a.inverse[part.first + j];
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int j = start + k * kThreads, kept = part.kept + j;
          if (j >= part.count) continue;
          const T lam = step.action == kDropH ? a.lam[(part.begin + j) * a.lam_stride] : T(0);
          r[k] = cg_move(step, static_cast<T>(step.alpha), kept_p[kept], kept_z[kept], lam, x[k],
                         r[k]);
          const T z = cg_z<kPreconditioned>(inverse, k, r[k]);
          kept_z[kept] = z;
          a.x[part.first + j] = x[k];
          a.r[part.first + j] = r[k];
          add_norms(r[k], z, x[k], norm);
        }
      }
      block_sum(norm, shared.warp_sum);
      send_sums(norm, shared.norms, blocks, at.block * own + n);
    }
    cluster_sync(blocks);
    add_shares(norm, shared.norms, shares);
  }
  const CgNorms norms = norms_of(norm);
  const CgDirection next = cg_direction(step, norms, rz_old, a.tol2[at.row]);

  for (int n = 0; n < own; ++n) {
    const CgShare part = share(n);
    if (next.action == kAdvance)
      for (int j = threadIdx.x; j < part.count; j += kThreads)
        a.p[part.first + j] =
            static_cast<T>(next.beta) * kept_p[part.kept + j] + kept_z[part.kept + j];
    if (next.action == kClear)
      for (int j = threadIdx.x; j < part.count; j += kThreads) a.x[part.first + j] = T(0);
  }
  // Every thread of every block has read the row's entries: a barrier has been passed.
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

// How cg_step would work on rows without a preconditioner.
template <typename T>
CgOccupancy cg_occupancy(int64_t rows, int64_t dim) {
  CgOccupancy found{cg_form<T>(rows, dim, cg_capacity<false, T>).blocks, {}};
  CgForm form{cg_shares(dim), 1};
  for (int k = 0; k < kClusterSizes && form.blocks <= form.shares; ++k, form.blocks *= 2)
    found.rows_at_a_time[k] = cg_capacity<false, T>(form.blocks, form.shared_bytes<T>(dim));
  return found;
}

// The doubles that cg_step wants for `workspace`, on the current device.
template <typename T>
int64_t cg_workspace(const CgArgs<T>& a) {
  if (a.rows == 0 || cg_form(a).blocks != 0) return 0;
  return a.rows *
         (static_cast<int64_t>(sizeof(CgRow) / sizeof(double)) + blocks_per_row(a.dim) * 5);
}

template <bool kPreconditioned, typename T>
int cg_step_as(const CgArgs<T>& a, double* workspace, Stream stream) {
  if (const CgForm form = cg_form(a); form.blocks != 0)
    return launch_clusters(cg_row_kernel<kPreconditioned, T>, a.rows, form.blocks,
                           form.shared_bytes<T>(a.dim), stream, a, form.shares, form.blocks);
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
