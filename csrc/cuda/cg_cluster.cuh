// A CG iteration in one launch, with a cluster per row; see cg_step.cuh.
//
// p and Ap, later z, stay in the blocks' shared memory, and a row's sums are exchanged through
// shared memory. A row is cut into cg_shares(dim) shares. Each is summed separately and the sums
// are added in the order of the shares, so the number of blocks does not change any bit.
#pragma once
#include "cuda/cg_terms.cuh"
#include "cuda/cluster.cuh"

namespace imaml::cuda {

// A row is divided into shares of at least this many elements.
constexpr int64_t kRowShare = 4096;

// The most shares that one block processes, one after the other.
constexpr int kBlockShares = 4;

// Elements of each operand that a thread loads at once, 64 bytes, to hide the latency.
template <typename T>
constexpr int kRowItems = 64 / sizeof(T);

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
    const int64_t kept = 2 * block_shares() * cg_share_length(dim, shares);
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

// A share of a row.
struct CgShare {
  int64_t begin;  // index in the row
  int64_t first;  // index in the operands
  int count;
  int kept;  // index in the block's shared memory

  __device__ CgShare(int64_t dim, int64_t row, int64_t number, int64_t length, int kept_before)
      : begin(number * length),
        first(row * dim + begin),
        count(static_cast<int>(begin + length < dim ? length : dim - begin)),
        kept(static_cast<int>(kept_before * length)) {}
};

// Each thread handles the same elements in all three passes, so kept_p and kept_z need no barrier.
template <bool kPreconditioned, typename T>
__global__ void __launch_bounds__(kThreads, 2) cg_row_kernel(CgArgs<T> a, int shares, int blocks) {
  const BlockCoord at(blocks);
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
  T* const kept_z = kept_p + own * length;  // Ap until r is updated

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
          const T lam =
              step.action == kProximalStep ? a.lam[(part.begin + j) * a.lam_stride] : T(0);
          r[k] = cg_take_step(step, static_cast<T>(step.alpha), kept_p[kept], kept_z[kept], lam,
                              x[k], r[k]);
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
  // A barrier has passed since every thread of every block read the row's entries.
  if (records) cg_record(a, at.row, sums, step, next, norms, rz_old);
}

}  // namespace imaml::cuda
