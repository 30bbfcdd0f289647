// The CPU kernels and the emulated CUDA kernels against a float64 oracle, at sizes that straddle
// every boundary: lanes (16), threads (256), a block's share (2048), a row in registers (4096), a
// CPU chunk (4096), and the blocks of a row (512).
//
// Also: the same bits whatever the number of threads, and whatever order the emulated threads run
// in. Buffers have exactly the size that a kernel may touch, so that AddressSanitizer sees the
// rest.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cg_step.cuh"
#include "kernels/cpu_drivers.h"
#include "kernels/prox_gd.cuh"
#include "kernels/row_sums.cuh"

namespace imaml {
namespace {

using cpu::int64_t;

int failures = 0;
int checks = 0;
std::string context;

void expect(bool ok, const char* what) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s: %s\n", context.c_str(), what);
}

template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 2e-6 : 1e-14;

// |got - want| against the size of what was added up to `want`
template <typename T>
void expect_close(long double got, long double want, long double scale, const char* what) {
  if (std::isnan(want)) return expect(std::isnan(got), what);
  expect(std::abs(got - want) <= kTolerance<T> * (std::abs(scale) + 1e-30), what);
}

struct Threads {
  int count;
  template <typename Body>
  void operator()(int64_t n, int64_t, const Body& body) const {
    std::vector<std::thread> pool;
    const int64_t share = (n + count - 1) / count;
    for (int64_t begin = 0; begin < n; begin += share)
      pool.emplace_back([=, &body] { body(begin, std::min(n, begin + share)); });
    for (auto& one : pool) one.join();
  }
};

template <typename T>
std::vector<T> normal(int64_t count, unsigned seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> draw;
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = static_cast<T>(draw(generator));
  return values;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}

// ---- cg_step ---------------------------------------------------------------------------------

// What happens to a row in this iteration. Row k is of kind k % kKinds.
enum Kind {
  kHealthy,
  kFrozen,
  kNegativeAtOnce,
  kNegativeLater,
  kNanProduct,
  kArrives,
  kInfiniteNorm,
  kOverflows,  // alpha is finite in float64; x or r.r is not finite in T
  kKinds
};
Kind kind_of(int64_t row) { return static_cast<Kind>(row % kKinds); }

template <typename T>
struct CgState {
  int64_t rows, dim;
  std::vector<T> x, r, p, hp, lam;
  T damping = T(0.25);
  std::vector<double> rr, tol2, curvature, beta;
  std::vector<std::int32_t> status, steps;

  CgState(int64_t rows, int64_t dim, bool diagonal) : rows(rows), dim(dim) {
    const unsigned seed = static_cast<unsigned>(rows * 100003 + dim);
    x = normal<T>(rows * dim, seed + 1);
    r = normal<T>(rows * dim, seed + 2);
    p = normal<T>(rows * dim, seed + 3);
    hp = normal<T>(rows * dim, seed + 4);
    lam = normal<T>(diagonal ? dim : 1, seed + 5);
    for (T& value : lam) value = std::abs(value) + T(0.5);
    for (int64_t i = 0; i < rows * dim; ++i)  // H = 2 I plus a little, so that p.Ap > 0
      hp[at(i)] = T(2) * p[at(i)] + T(0.01) * hp[at(i)];
    rr.assign(at(rows), 0);
    tol2.assign(at(rows), 0);
    curvature.assign(at(rows), -7);
    beta.assign(at(rows), -7);
    status.assign(at(rows), kRunning);
    steps.assign(at(rows), 3);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < dim; ++i)
        rr[at(row)] += double(r[at(row * dim + i)]) * double(r[at(row * dim + i)]);
      const Kind kind = kind_of(row);
      T* h = hp.data() + row * dim;
      if (kind == kFrozen) status[at(row)] = kConverged;
      if (kind == kNegativeAtOnce) steps[at(row)] = 0;
      if (kind == kNegativeAtOnce || kind == kNegativeLater)
        for (int64_t i = 0; i < dim; ++i) h[i] = T(-50) * p[at(row * dim + i)];
      if (kind == kNanProduct && dim > 0) h[dim / 2] = static_cast<T>(NAN);
      if (kind == kArrives) tol2[at(row)] = 1e30;
      if (kind == kInfiniteNorm) rr[at(row)] = INFINITY;
      if (kind == kOverflows) rr[at(row)] = sizeof(T) == 4 ? 1e76 : 1e300;
    }
  }

  static std::size_t at(int64_t i) { return static_cast<std::size_t>(i); }

  CgArgs<T> args() {
    return {
        x.data(),    r.data(),  p.data(),    hp.data(),     lam.data(),   lam.size() > 1 ? 1 : 0,
        damping,     rr.data(), tol2.data(), status.data(), steps.data(), curvature.data(),
        beta.data(), rows,      dim};
  }

  bool same(const CgState& o) const {
    return same_bits(x, o.x) && same_bits(r, o.r) && same_bits(p, o.p) && same_bits(rr, o.rr) &&
           same_bits(curvature, o.curvature) && same_bits(beta, o.beta) && status == o.status &&
           steps == o.steps;
  }
};

// Compares `got` with what one CG iteration makes of `before`, computed here, in float64.
template <typename T>
void check_cg(const CgState<T>& before, const CgState<T>& got) {
  const auto at = CgState<T>::at;
  for (int64_t row = 0; row < before.rows; ++row) {
    const std::string outer = context;
    context += ", row " + std::to_string(row);
    const T* p = before.p.data() + row * before.dim;
    const T* hp = before.hp.data() + row * before.dim;
    std::vector<double> ap(at(before.dim)), lam(at(before.dim));
    long double pap = 0, size = 0;
    for (int64_t i = 0; i < before.dim; ++i) {
      lam[at(i)] = double(before.lam[before.lam.size() > 1 ? at(i) : 0]);
      ap[at(i)] = double(hp[i]) + (lam[at(i)] + double(before.damping)) * double(p[i]);
      pap += static_cast<long double>(p[i]) * ap[at(i)];
      size += std::abs(double(p[i]) * ap[at(i)]);
    }
    const Kind kind = kind_of(row);
    const double rr = before.rr[at(row)];
    const bool moves = kind == kHealthy || kind == kArrives;
    const bool clears = kind == kNanProduct || kind == kInfiniteNorm || kind == kOverflows;
    const double alpha = moves ? static_cast<double>(rr / pap) : 0;
    long double rr_new = 0;
    for (int64_t i = 0; i < before.dim; ++i) {
      const double r = double(before.r[at(row * before.dim + i)]) - (moves ? alpha * ap[at(i)] : 0);
      rr_new += r * r;
    }
    const double beta = moves ? static_cast<double>(rr_new / rr) : 0;
    for (int64_t i = 0; i < before.dim; ++i) {
      const std::size_t j = at(row * before.dim + i);
      double x = double(before.x[j]) + alpha * double(p[i]);
      if (kind == kNegativeAtOnce) x += double(p[i]) / lam[at(i)];
      if (clears) x = 0;
      const double change = moves ? alpha * ap[at(i)] : 0;
      const double r = double(before.r[j]) - change;
      const double direction = kind == kHealthy ? r + beta * double(p[i]) : double(p[i]);
      expect_close<T>(double(got.x[j]), x, std::abs(x) + std::abs(double(p[i]) * 2) + 1, "x");
      if (kind != kOverflows)
        expect_close<T>(double(got.r[j]), r, std::abs(double(before.r[j])) + std::abs(change) + 1,
                        "r");
      expect_close<T>(double(got.p[j]), direction, 4 * (std::abs(r) + std::abs(double(p[i])) + 1),
                      "p");
    }
    const std::int32_t ends[kKinds] = {kRunning,           kConverged, kNegativeCurvature,
                                       kNegativeCurvature, kNonfinite, kConverged,
                                       kNonfinite,         kNonfinite};
    expect(got.status[at(row)] == ends[kind], "status");
    expect(got.steps[at(row)] == before.steps[at(row)] + (moves ? 1 : 0), "steps");
    expect_close<T>(got.beta[at(row)], beta, 8 * std::abs(beta) + 1, "beta");
    if (kind != kNanProduct && kind != kInfiniteNorm)
      expect_close<T>(got.curvature[at(row)], kind == kFrozen ? 0 : pap / rr, size / rr,
                      "curvature");
    const long double left = clears ? NAN : (moves ? rr_new : rr);
    expect_close<T>(got.rr[at(row)], left, 4 * (rr + rr_new) + 1, "rr");
    context = outer;
  }
}

template <typename T>
void test_cg(int64_t rows, int64_t dim, bool diagonal) {
  const std::string name = std::string("cg_step<") + (sizeof(T) == 4 ? "float" : "double") + ">[" +
                           std::to_string(rows) + ", " + std::to_string(dim) + "]" +
                           (diagonal ? " diagonal" : "");
  const CgState<T> before(rows, dim, diagonal);
  CgState<T> serial = before;
  cpu::cg_step(serial.args(), 1, cpu::Serial{});
  context = name + " cpu";
  check_cg(before, serial);
  for (int threads : {2, 3, 8}) {
    CgState<T> parallel = before;
    cpu::cg_step(parallel.args(), threads, Threads{threads});
    context = name + " cpu, threads " + std::to_string(threads);
    expect(parallel.same(serial), "the number of threads changes the bits");
  }
  CgState<T> first = before;
  for (auto order : {shim::Order::kForwards, shim::Order::kBackwards, shim::Order::kShuffled,
                     shim::Order::kWarpByWarp}) {
    shim::order = order;
    CgState<T> state = before;
    std::vector<double> workspace(CgState<T>::at(cuda::cg_workspace_doubles(rows, dim)), NAN);
    cuda::cg_step(state.args(), workspace.data(), nullptr);
    context = name + " cuda, order " + std::to_string(static_cast<int>(order));
    if (order == shim::Order::kForwards) {
      check_cg(before, state);
      first = state;
    } else {
      expect(state.same(first), "the order of threads changes the bits: a race");
    }
  }
}

// Whole solves: the system's solution, and a row's bits are the same alone and in a batch.
template <typename T>
void test_solve(int64_t dim) {
  context = "cg solve, dim " + std::to_string(dim);
  const int64_t rows = 3;
  std::vector<double> eigenvalues(static_cast<std::size_t>(dim));
  for (int64_t i = 0; i < dim; ++i) eigenvalues[CgState<T>::at(i)] = 1 + double(i % 5);
  CgState<T> s(rows, dim, false);
  const std::vector<T> b = s.r;
  s.damping = 0;
  s.lam = {T(1)};
  std::fill(s.x.begin(), s.x.end(), T(0));
  s.p = s.r;
  std::fill(s.steps.begin(), s.steps.end(), 0);
  std::fill(s.status.begin(), s.status.end(), std::int32_t{kRunning});
  for (int64_t row = 0; row < rows; ++row) {
    s.rr[CgState<T>::at(row)] = cpu::dot(b.data() + row * dim, b.data() + row * dim, 0, dim);
    s.tol2[CgState<T>::at(row)] = s.rr[CgState<T>::at(row)] * (sizeof(T) == 4 ? 1e-11 : 1e-26);
  }
  for (int k = 0; k < 8; ++k) {
    for (int64_t i = 0; i < rows * dim; ++i)
      s.hp[CgState<T>::at(i)] =
          static_cast<T>(eigenvalues[CgState<T>::at(i % dim)]) * s.p[CgState<T>::at(i)];
    std::vector<double> workspace(CgState<T>::at(cuda::cg_workspace_doubles(rows, dim)));
    cuda::cg_step(s.args(), workspace.data(), nullptr);
  }
  for (int64_t row = 0; row < rows; ++row)
    expect(s.status[CgState<T>::at(row)] == kConverged, "five distinct eigenvalues, not converged");
  for (int64_t i = 0; i < rows * dim; ++i) {
    const double want = double(b[CgState<T>::at(i)]) / (1 + eigenvalues[CgState<T>::at(i % dim)]);
    expect(std::abs(double(s.x[CgState<T>::at(i)]) - want) < (sizeof(T) == 4 ? 1e-4 : 1e-11),
           "solution");
  }
}

// ---- prox_gd and the row sums ----------------------------------------------------------------

template <typename T>
void test_prox(int64_t rows, int64_t dim, bool diagonal, bool momentum) {
  context = std::string("prox<") + (sizeof(T) == 4 ? "float" : "double") + ">[" +
            std::to_string(rows) + ", " + std::to_string(dim) + "]" +
            (diagonal ? " diagonal" : "") + (momentum ? " momentum" : "");
  const unsigned seed = static_cast<unsigned>(rows * 7919 + dim);
  const auto at = CgState<T>::at;
  const auto phi = normal<T>(rows * dim, seed), grad = normal<T>(rows * dim, seed + 1),
             velocity = normal<T>(rows * dim, seed + 2), theta = normal<T>(dim, seed + 3),
             lam = normal<T>(diagonal ? dim : 1, seed + 4);
  std::vector<std::int32_t> status(at(rows), kRunning);
  for (int64_t row = 1; row < rows; row += 3) status[at(row)] = kConverged;
  const T lr = T(0.1), mu = T(0.9);

  auto arguments = [&](std::vector<T>& p, std::vector<T>& v) {
    return ProxArgs<T>{p.data(),
                       momentum ? v.data() : nullptr,
                       grad.data(),
                       theta.data(),
                       lam.data(),
                       diagonal && dim > 1 ? 1 : 0,
                       lr,
                       mu,
                       /*nesterov=*/diagonal,
                       status.data(),
                       rows,
                       dim};
  };
  auto check = [&](const std::vector<T>& p, const std::vector<T>& v, const char* what) {
    for (int64_t i = 0; i < rows * dim; ++i) {
      const double g = double(grad[at(i)]) + double(lam[diagonal ? at(i % dim) : 0]) *
                                                 (double(phi[at(i)]) - double(theta[at(i % dim)]));
      const bool frozen = status[at(i / dim)] != kRunning;
      const double v_new = double(mu) * double(velocity[at(i)]) + g;
      double d = momentum ? (diagonal ? g + double(mu) * v_new : v_new) : g;
      if (frozen) d = 0;
      expect_close<T>(double(p[at(i)]), double(phi[at(i)]) - double(lr) * d, 16, what);
      if (momentum)
        expect_close<T>(double(v[at(i)]), frozen ? double(velocity[at(i)]) : v_new, 16, what);
    }
  };
  auto p1 = phi, v1 = velocity, p2 = phi, v2 = velocity, p3 = phi, v3 = velocity;
  cpu::prox_gd_step(arguments(p1, v1), 1, cpu::Serial{});
  check(p1, v1, "cpu");
  cpu::prox_gd_step(arguments(p2, v2), 5, Threads{5});
  expect(same_bits(p1, p2) && same_bits(v1, v2), "the number of threads changes the bits");
  cuda::prox_gd(arguments(p3, v3), nullptr);
  check(p3, v3, "cuda");

  std::vector<double> norms(at(2 * rows), -1), norms_parallel = norms, norms_cuda = norms;
  std::vector<double> dots(at(rows), -1), dots_parallel = dots, dots_cuda = dots;
  auto p4 = phi, v4 = velocity;
  const ProxArgs<T> args = arguments(p4, v4);
  cpu::prox_norms(args, norms.data(), 1, cpu::Serial{});
  cpu::prox_norms(args, norms_parallel.data(), 5, Threads{5});
  cpu::row_dot(phi.data(), grad.data(), dots.data(), rows, dim, 1, cpu::Serial{});
  cpu::row_dot(phi.data(), grad.data(), dots_parallel.data(), rows, dim, 5, Threads{5});
  expect(same_bits(norms, norms_parallel) && same_bits(dots, dots_parallel),
         "the number of threads changes a sum's bits");
  for (auto order : {shim::Order::kForwards, shim::Order::kShuffled}) {
    shim::order = order;
    std::vector<double> two(at(cuda::row_sums_workspace(rows, dim, 2)), NAN);
    std::vector<double> one(at(cuda::row_sums_workspace(rows, dim, 1)), NAN);
    cuda::row_sums(cuda::ProxNorms<T>{args, rows, dim}, norms_cuda.data(), two.data(), nullptr);
    cuda::row_sums(cuda::Dot<T>{phi.data(), grad.data(), rows, dim}, dots_cuda.data(), one.data(),
                   nullptr);
    for (int64_t row = 0; row < rows; ++row) {
      long double norm2 = 0, penalty = 0, dot = 0, size = 0, penalty_size = 0;
      for (int64_t i = 0; i < dim; ++i) {
        const long double p = phi[at(row * dim + i)], g = grad[at(row * dim + i)];
        const long double l = lam[diagonal ? at(i) : 0], away = p - theta[at(i)];
        norm2 += (g + l * away) * (g + l * away);
        penalty += l * away * away;
        penalty_size += std::abs(l * away * away);
        dot += p * g;
        size += std::abs(p * g);
      }
      for (const auto* got : {&norms, &norms_cuda}) {
        expect_close<T>((*got)[at(2 * row)], norm2, norm2, "gradient norm");
        expect_close<T>((*got)[at(2 * row + 1)], penalty, penalty_size, "penalty");
      }
      expect_close<double>(dots[at(row)], dot, 10 * size, "dot, cpu");
      expect_close<double>(dots_cuda[at(row)], dot, 10 * size, "dot, cuda");
    }
  }
}

// The emulation can tell a race: this kernel lacks the barrier between write and read.
__global__ void racy_kernel(double* out) {
  __shared__ double cell[256];
  cell[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = cell[(threadIdx.x + 1) % 256];
}

// The same for a write after read: a warp may be a round ahead of one that has yet to read.
__global__ void reusing_kernel(double* out) {
  __shared__ double cell[8];
  double total = 0;
  for (int round = 0; round < 2; ++round) {
    const double value = __shfl_xor_sync(0xffffffffu, double(threadIdx.x * (round + 1)), 1);
    if (threadIdx.x % 32 == 0) cell[threadIdx.x / 32] = value;
    __syncthreads();
    for (int warp = 0; warp < 8; ++warp) total += cell[warp];
  }
  out[threadIdx.x] = total;
}

void test_the_emulation_sees_a_missing_barrier() {
  context = "cuda_shim";
  std::vector<double> forwards(256), backwards(256);
  shim::order = shim::Order::kForwards;
  cuda::launch(racy_kernel, 1, nullptr, forwards.data());
  shim::order = shim::Order::kBackwards;
  cuda::launch(racy_kernel, 1, nullptr, backwards.data());
  expect(!same_bits(forwards, backwards), "a kernel without its barrier gives one result");
  shim::order = shim::Order::kForwards;
  cuda::launch(reusing_kernel, 1, nullptr, forwards.data());
  shim::order = shim::Order::kWarpByWarp;
  cuda::launch(reusing_kernel, 1, nullptr, backwards.data());
  expect(!same_bits(forwards, backwards), "a write after read without a barrier gives one result");
}

template <typename T>
void test_all() {
  for (int64_t dim :
       {0, 1, 2, 15, 16, 17, 31, 33, 255, 256, 257, 2047, 2049, 4095, 4096, 4097, 8193})
    for (int64_t rows : {0, 1, 8}) {
      for (bool diagonal : {false, true}) {
        if (dim > 1 || (dim == 1 && !diagonal)) test_cg<T>(rows, dim, diagonal);
        test_prox<T>(rows, dim, diagonal && dim > 1, /*momentum=*/dim % 2 == 1);
      }
    }
  // More than kMaxBlocksPerRow blocks' worth of elements in a row: the stride loop wraps.
  test_prox<T>(1, 2048 * 512 + 3, false, false);
  test_cg<T>(1, 2048 * 512 + 3, true);
  for (int64_t dim : {5, 100, 5000}) test_solve<T>(dim);
}

}  // namespace
}  // namespace imaml

int main() {
  std::printf("instruction set: %s\n", imaml::cpu::instruction_set());
  imaml::test_the_emulation_sees_a_missing_barrier();
  imaml::test_all<float>();
  imaml::test_all<double>();
  std::printf("%d checks, %d failed\n", imaml::checks, imaml::failures);
  return imaml::failures == 0 ? 0 : 1;
}
