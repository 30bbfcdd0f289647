// A CG iteration in one launch, with a cluster per row; see cg_step.cuh.
//
// p and Ap, later z, stay in the blocks' shared memory, and a row's sums are exchanged through
// shared memory. The memory is busy from the start: p and Hp are copied to shared memory 16 bytes
// at a time and without registers, and x and r are read into the L2 cache behind them, while the
// first sums are added up and exchanged. A row is cut into cg_shares(dim) shares. Each is summed
// separately and the sums are added in the order of the shares, so the number of blocks does not
// change any bit.
#pragma once
#include "cuda/cg_terms.cuh"
#include "cuda/cluster.cuh"
#include "cuda/vector.cuh"

namespace imaml::cuda {

// A row is divided into shares of at least this many elements.
constexpr int64_t kRowShare = 4096;

// The most shares that one block processes, one after the other.
constexpr int kBlockShares = 4;

// Elements of each operand that a thread loads at once, 32 bytes, to hide the latency: as many as
// the registers of three blocks per multiprocessor allow. M^-1 is one more operand.
template <bool kPreconditioned, typename T>
constexpr int kRowItems = (kPreconditioned ? 24 : 32) / sizeof(T);

// The shared memory of a block, before its shares of p and Ap.
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

// Elements per share: a multiple of the warp size, so that the shares of an aligned row are
// aligned.
IMAML_INLINE int64_t cg_share_length(int64_t dim, int shares) {
  const int64_t warps = (dim + int64_t{shares} * kWarp - 1) / (int64_t{shares} * kWarp);
  return warps * kWarp;
}

// How a row is divided. 0 blocks: three launches.
struct CgForm {
  int shares;
  int blocks;

  int block_shares() const { return shares / blocks; }
  template <typename T>
  int64_t shared_bytes(int64_t dim) const {
    const int64_t kept = 2 * (block_shares() * cg_share_length(dim, shares) + kVector<T>);
    return static_cast<int64_t>(sizeof(CgShared) + sizeof(T) * kept);
  }
};

// The number of blocks that minimises the time for all rows: a block takes time in proportion to
// its shares, and capacity(blocks, bytes) clusters run at the same time. Ties go to the fewest
// blocks.
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

// Each thread handles the same elements in all three passes, so kept_p and kept_z need no barrier
// once they are copied.
template <bool kPreconditioned, typename T>
__global__ void __launch_bounds__(kThreads, 3) cg_row_kernel(CgArgs<T> a, int shares, int blocks) {
  const BlockCoord at(blocks);
  const std::int32_t status = a.status[at.row], steps = a.steps[at.row];
  const double rz_old = cg_old_rz(a, at.row);
  const bool records = at.block == 0 && threadIdx.x == 0;
  if (status != kRunning) {
    if (records) a.curvature[at.row] = a.beta[at.row] = 0;
    return;
  }
  cluster_arrive_relaxed();
  constexpr int kBatch = kRowItems<kPreconditioned, T>;
  const int own = shares / blocks, length = static_cast<int>(cg_share_length(a.dim, shares));
  // This block's shares are elements 0 ... count - 1 of the pointers below; the last blocks of a
  // row may have none.
  const int64_t begin = at.block * own * length, left = a.dim - begin;
  const int count = left <= 0 ? 0 : static_cast<int>(left < own * length ? left : own * length);
  const int64_t first = count > 0 ? at.row * a.dim + begin : 0;
  T* const x_row = a.x + first;
  T* const r_row = a.r + first;
  const bool diagonal = a.lam_stride != 0;
  const T* const lam_row = a.lam + (diagonal && count > 0 ? begin : 0);
  const T uniform_lam = diagonal ? T(0) : *a.lam;
  const auto lam_at = [&](int j) { return diagonal ? lam_row[j] : uniform_lam; };
  const auto share_end = [&](int n) { return (n + 1) * length < count ? (n + 1) * length : count; };
  CgShared& shared = *reinterpret_cast<CgShared*>(dynamic_shared());
  T* const buffer = reinterpret_cast<T*>(&shared + 1);
  T* const kept_p = copy_row_async(buffer, static_cast<const T*>(a.p) + first, count);
  // Hp, then Ap, then z:
  T* const kept_z = copy_row_async(buffer + own * length + kVector<T>, a.hp + first, count);
  prefetch_row(r_row, count);
  prefetch_row(x_row, count);
  if constexpr (kPreconditioned) prefetch_row(a.inverse + first, count);
  wait_for_copies();
  __syncthreads();  // for the copies of the other threads

  double sum[3];
  for (int n = 0; n < own; ++n) {
    for (double& one : sum) one = 0;
    const int end = share_end(n);
    for (int start = n * length + threadIdx.x; start < end; start += kBatch * kThreads) {
      T p[kBatch] = {}, ap[kBatch] = {};
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int j = start + k * kThreads;
        if (j >= end) continue;
        p[k] = kept_p[j];
        ap[k] = cg_operator(kept_z[j], lam_at(j), a.damping, p[k]);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int j = start + k * kThreads;
        if (j >= end) continue;
        kept_z[j] = ap[k];
        add_curvature(p[k], ap[k], sum);
      }
    }
    block_sum(sum, shared.warp_sum);
    if (n == 0) cluster_wait();  // every block has started
    send_sums(sum, shared.sums, blocks, at.block * own + n);
  }
  cluster_sync(blocks);
  add_shares(sum, shared.sums, shares);
  const CgSums sums{sum[0], sum[1], sum[2]};
  const CgStep step = cg_step_length<T>(sums, rz_old, steps);

  double norm[kNorms<kPreconditioned>] = {};
  if (step.action != kFreeze) {
    for (int n = 0; n < own; ++n) {
      for (double& one : norm) one = 0;
      const int end = share_end(n);
      for (int start = n * length + threadIdx.x; start < end; start += kBatch * kThreads) {
        T x[kBatch] = {}, r[kBatch] = {}, inverse[kBatch] = {};
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int j = start + k * kThreads;
          if (j >= end) continue;
          x[k] = x_row[j];
          r[k] = r_row[j];
          if constexpr (kPreconditioned) inverse[k] = a.inverse[first + j];
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int j = start + k * kThreads;
          if (j >= end) continue;
          const T lam = step.action == kProximalStep ? lam_at(j) : T(0);
          r[k] =
              cg_take_step(step, static_cast<T>(step.alpha), kept_p[j], kept_z[j], lam, x[k], r[k]);
          const T z = cg_z<kPreconditioned>(inverse, k, r[k]);
          kept_z[j] = z;
          x_row[j] = x[k];
          r_row[j] = r[k];
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

  if (next.action == kAdvance) {
    T* const p_row = a.p + first;
    for (int n = 0; n < own; ++n)
#pragma unroll 8
      for (int j = n * length + threadIdx.x; j < share_end(n); j += kThreads)
        p_row[j] = static_cast<T>(next.beta) * kept_p[j] + kept_z[j];
  }
  if (next.action == kClear)
    for (int n = 0; n < own; ++n)
      for (int j = n * length + threadIdx.x; j < share_end(n); j += kThreads) x_row[j] = T(0);
  // A barrier has passed since every thread of every block read the row's entries.
  if (records) cg_record(a, at.row, sums, step, next, norms, rz_old);
}

}  // namespace imaml::cuda
