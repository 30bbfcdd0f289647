// cg_step: every way an iteration can end, and whole solves.
#include <set>

#include "harness.h"
#include "kernels/cg_step.cuh"

namespace imaml {
namespace {

// What happens to a row in this iteration. Row k is of kind k % kKinds.
enum Kind {
  kHealthy,
  kFrozen,
  kNegativeAtOnce,
  kNegativeLater,
  kNanProduct,
  kArrives,
  kInfiniteNorm,
  kOverflows,   // alpha is finite in float64; x or r.r is not finite in T
  kIndefinite,  // its M^-1 is negative, so that the new r.z is; healthy without a preconditioner
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
  std::vector<T> inverse;  // empty without a preconditioner, and so is rz
  std::vector<double> rz;

  CgState(int64_t rows, int64_t dim, bool diagonal, bool preconditioned) : rows(rows), dim(dim) {
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
    if (preconditioned) precondition(normal<T>(rows * dim, seed + 6));
  }

  void precondition(std::vector<T> values) {
    inverse = std::move(values);
    rz = rr;  // where a row's is not finite, or too large
    for (int64_t row = 0; row < rows; ++row) {
      const Kind kind = kind_of(row);
      if (kind != kInfiniteNorm && kind != kOverflows) rz[at(row)] = 0;
      for (int64_t j = row * dim; j < (row + 1) * dim; ++j) {
        inverse[at(j)] = std::abs(inverse[at(j)]) + T(0.5);
        rz[at(row)] += double(r[at(j)]) * double(inverse[at(j)]) * double(r[at(j)]);
        if (kind == kIndefinite) inverse[at(j)] = -inverse[at(j)];
      }
    }
  }

  bool preconditioned() const { return !inverse.empty(); }

  CgArgs<T> args() {
    CgArgs<T> a{};
    a.x = x.data();
    a.r = r.data();
    a.p = p.data();
    a.hp = hp.data();
    a.lam = lam.data();
    a.lam_stride = lam.size() > 1 ? 1 : 0;
    a.damping = damping;
    a.inverse = preconditioned() ? inverse.data() : nullptr;
    a.rr = rr.data();
    a.rz = preconditioned() ? rz.data() : nullptr;
    a.tol2 = tol2.data();
    a.status = status.data();
    a.steps = steps.data();
    a.curvature = curvature.data();
    a.beta = beta.data();
    a.rows = rows;
    a.dim = dim;
    return a;
  }

  bool same(const CgState& o) const {
    return same_bits(x, o.x) && same_bits(r, o.r) && same_bits(p, o.p) && same_bits(rr, o.rr) &&
           same_bits(rz, o.rz) && same_bits(curvature, o.curvature) && same_bits(beta, o.beta) &&
           status == o.status && steps == o.steps;
  }
};

// Compares `got` with what one CG iteration makes of `before`, computed here, in float64.
template <typename T>
void check_cg(const CgState<T>& before, const CgState<T>& got) {
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
    const bool preconditioned = before.preconditioned();
    const double rr = before.rr[at(row)], rz = preconditioned ? before.rz[at(row)] : rr;
    const bool moves = kind == kHealthy || kind == kArrives || kind == kIndefinite;
    const bool clears = kind == kNanProduct || kind == kInfiniteNorm || kind == kOverflows ||
                        (kind == kIndefinite && preconditioned);
    const bool goes_on = moves && !clears && kind != kArrives;
    const double alpha = moves ? static_cast<double>(rz / pap) : 0;
    const auto inverse = [&](std::size_t j) {
      return preconditioned ? double(before.inverse[j]) : 1.0;
    };
    long double rr_new = 0, rz_new = 0;
    for (int64_t i = 0; i < before.dim; ++i) {
      const std::size_t j = at(row * before.dim + i);
      const double r = double(before.r[j]) - (moves ? alpha * ap[at(i)] : 0);
      rr_new += r * r;
      rz_new += r * inverse(j) * r;
    }
    const double beta = moves && !clears ? static_cast<double>(rz_new / rz) : 0;
    for (int64_t i = 0; i < before.dim; ++i) {
      const std::size_t j = at(row * before.dim + i);
      double x = double(before.x[j]) + alpha * double(p[i]);
      if (kind == kNegativeAtOnce) x += double(before.r[j]) / lam[at(i)];
      if (clears) x = 0;
      const double change = moves ? alpha * ap[at(i)] : 0;
      const double r = double(before.r[j]) - change, z = inverse(j) * r;
      const double direction = goes_on ? z + beta * double(p[i]) : double(p[i]);
      expect_close<T>(double(got.x[j]), x, std::abs(x) + std::abs(double(before.x[j])) + 1, "x");
      if (kind != kOverflows)
        expect_close<T>(double(got.r[j]), r, std::abs(double(before.r[j])) + std::abs(change) + 1,
                        "r");
      expect_close<T>(double(got.p[j]), direction, 4 * (std::abs(z) + std::abs(double(p[i])) + 1),
                      "p");
    }
    const std::int32_t ends[kKinds] = {
        kRunning,           kConverged, kNegativeCurvature,
        kNegativeCurvature, kNonfinite, kConverged,
        kNonfinite,         kNonfinite, preconditioned ? kNonfinite : kRunning};
    expect(got.status[at(row)] == ends[kind], "status");
    expect(got.steps[at(row)] == before.steps[at(row)] + (moves && !clears ? 1 : 0), "steps");
    expect_close<T>(got.beta[at(row)], beta, 8 * std::abs(beta) + 1, "beta");
    if (kind != kNanProduct && kind != kInfiniteNorm)
      expect_close<T>(got.curvature[at(row)], kind == kFrozen ? 0 : pap / rz, size / rz,
                      "curvature");
    expect_close<T>(got.rr[at(row)],
                    clears  ? NAN
                    : moves ? rr_new
                            : rr,
                    4 * (rr + rr_new) + 1, "rr");
    if (preconditioned)
      expect_close<T>(got.rz[at(row)],
                      clears  ? NAN
                      : moves ? rz_new
                              : rz,
                      4 * (rz + rz_new) + 1, "rz");
    context = outer;
  }
}

template <typename T, typename ParallelFor = cpu::Serial>
CgState<T> cpu_step(CgState<T> state, int threads = 1, const ParallelFor& parallel_for = {}) {
  cpu::cg_step(state.args(), threads, parallel_for);
  return state;
}

// The devices that a launch can meet, by the dynamic shared memory of a block in clusters of 1, 2,
// 4, 8 and 16 blocks: compute capability 9.0; the same where 16 blocks are refused; 8.0; none.
constexpr int64_t kHopper = 227 * 1024;
constexpr cuda::ClusterLimits kDevices[] = {{kHopper, kHopper, kHopper, kHopper, kHopper},
                                            {kHopper, kHopper, kHopper, kHopper, 0},
                                            {163 * 1024},
                                            {}};

template <typename T>
CgState<T> cuda_step(CgState<T> state) {
  std::vector<double> workspace(at(cuda::cg_workspace(state.args())), NAN);
  cuda::cg_step(state.args(), workspace.data(), nullptr);
  return state;
}

// On the device that shim::cluster_limits describes.
template <typename T>
CgState<T> test_on_device(const CgState<T>& before) {
  const std::string outer = context;
  CgState<T> first = before;
  for (auto order : {shim::Order::kForwards, shim::Order::kBackwards, shim::Order::kShuffled,
                     shim::Order::kWarpByWarp}) {
    shim::order = order;
    const CgState<T> state = cuda_step(before);
    context = outer + ", order " + std::to_string(static_cast<int>(order));
    if (order == shim::Order::kForwards) {
      check_cg(before, state);
      first = state;
    } else {
      expect(state.same(first), "the order of threads changes the bits: a race");
    }
  }
  context = outer;
  return first;
}

template <typename T>
void test_cg(int64_t rows, int64_t dim, bool diagonal, bool preconditioned) {
  const std::string name = name_of<T>("cg_step", rows, dim) + (diagonal ? " diagonal" : "") +
                           (preconditioned ? " preconditioned" : "");
  const CgState<T> before(rows, dim, diagonal, preconditioned);
  CgState<T> serial = cpu_step(before), identity = before;
  context = name + " cpu";
  check_cg(before, serial);
  for (int threads : {2, 3, 8}) {
    context = name + " cpu, threads " + std::to_string(threads);
    expect(cpu_step(before, threads, Threads{threads}).same(serial),
           "the number of threads changes the bits");
  }
  if (!preconditioned) {
    identity.inverse.assign(before.x.size(), T(1));
    identity.rz = identity.rr;
    serial.rz = serial.rr;
    expect(cpu_step(identity).same(serial), "M = I has other bits than none, cpu");
  }
  std::set<int> tested;
  for (const cuda::ClusterLimits& limits : kDevices) {
    // A short row is a matter of one block, but on the device that has none.
    const int blocks = cuda::cg_row_blocks<T>(dim, limits);
    if (!tested.insert(blocks).second || (blocks == 0 && dim < 4095)) continue;
    shim::cluster_limits = limits;
    context = name + " cuda, blocks " + std::to_string(blocks);
    CgState<T> state = test_on_device(before);
    if (preconditioned) continue;
    state.rz = state.rr;
    expect(cuda_step(identity).same(state), "M = I has other bits than none, cuda");
  }
}

// Which form a row takes: as many blocks as its length is worth, if the device holds it.
void test_forms() {
  context = "cg_row_blocks";
  const auto expect_blocks = [](int64_t dim, std::array<int, 4> floats,
                                std::array<int, 4> doubles) {
    for (std::size_t k = 0; k < 4; ++k) {
      expect(cuda::cg_row_blocks<float>(dim, kDevices[k]) == floats[k], "floats");
      expect(cuda::cg_row_blocks<double>(dim, kDevices[k]) == doubles[k], "doubles");
    }
  };
  expect_blocks(0, {1, 1, 1, 0}, {1, 1, 1, 0});
  expect_blocks(4096, {1, 1, 1, 0}, {1, 1, 1, 0});
  expect_blocks(4097, {2, 2, 0, 0}, {2, 2, 0, 0});
  expect_blocks(8193, {4, 4, 0, 0}, {4, 4, 0, 0});
  expect_blocks(32768, {8, 8, 0, 0}, {8, 8, 0, 0});
  expect_blocks(32769, {16, 8, 0, 0}, {16, 8, 0, 0});
  expect_blocks(113221, {16, 8, 0, 0}, {16, 8, 0, 0});
  expect_blocks(115712, {16, 8, 0, 0}, {16, 8, 0, 0});
  expect_blocks(115713, {16, 8, 0, 0}, {16, 0, 0, 0});
  expect_blocks(462848, {16, 0, 0, 0}, {0, 0, 0, 0});
  expect_blocks(462849, {0, 0, 0, 0}, {0, 0, 0, 0});
}

// A row arrives by r.r, whatever r.z is; it goes on only while r.z is positive and finite.
void test_direction() {
  context = "cg_direction";
  const auto status = [](double rr, double rz) {
    return cg_direction({kAdvance, kRunning, 1.0}, {rr, rz}, /*rz_old=*/1.0, /*tol2=*/2.0).status;
  };
  expect(status(1, 100) == kConverged, "r.r is within the tolerance, r.z is not");
  expect(status(3, 0.01) == kRunning, "r.z is within the tolerance, r.r is not");
  for (const double rz : {0.0, -1.0, double{INFINITY}, double{NAN}}) {
    expect(status(3, rz) == kNonfinite, "an r.z that allows no step");
    expect(status(1, rz) == kConverged, "an r.z that is not needed");
  }
}

// Whole solves, plain and with the system's diagonal for a preconditioner.
template <typename T>
void test_solve(int64_t dim, bool jacobi) {
  context = "cg solve, dim " + std::to_string(dim) + (jacobi ? " jacobi" : "");
  const int64_t rows = 3;
  std::vector<double> eigenvalues(static_cast<std::size_t>(dim));
  for (int64_t i = 0; i < dim; ++i) eigenvalues[at(i)] = 1 + double(i % 5);
  CgState<T> s(rows, dim, false, false);
  const std::vector<T> b = s.r;
  s.damping = 0;
  s.lam = {T(1)};
  std::fill(s.x.begin(), s.x.end(), T(0));
  s.p = s.r;
  std::fill(s.steps.begin(), s.steps.end(), 0);
  std::fill(s.status.begin(), s.status.end(), std::int32_t{kRunning});
  for (int64_t row = 0; row < rows; ++row) {
    s.rr[at(row)] = cpu::dot(b.data() + row * dim, b.data() + row * dim, 0, dim);
    s.tol2[at(row)] = s.rr[at(row)] * (sizeof(T) == 4 ? 1e-11 : 1e-26);
  }
  if (jacobi) {
    s.rz.assign(at(rows), 0);
    for (int64_t i = 0; i < rows * dim; ++i) {
      s.inverse.push_back(static_cast<T>(1 / (1 + eigenvalues[at(i % dim)])));
      s.p[at(i)] = s.inverse.back() * b[at(i)];
      s.rz[at(i / dim)] += double(b[at(i)]) * double(s.p[at(i)]);
    }
  }
  for (int k = 0; k < 8; ++k) {
    for (int64_t i = 0; i < rows * dim; ++i)
      s.hp[at(i)] = static_cast<T>(eigenvalues[at(i % dim)]) * s.p[at(i)];
    s = cuda_step(s);
  }
  for (int64_t row = 0; row < rows; ++row) {
    expect(s.status[at(row)] == kConverged, "five distinct eigenvalues, not converged");
    if (jacobi) expect(s.steps[at(row)] == 1, "M = A, and more than one step");
  }
  for (int64_t i = 0; i < rows * dim; ++i) {
    const double want = double(b[at(i)]) / (1 + eigenvalues[at(i % dim)]);
    expect(std::abs(double(s.x[at(i)]) - want) < (sizeof(T) == 4 ? 1e-4 : 1e-11), "solution");
  }
}

// In 16 blocks, or in 8 whose shares are more than a thread loads together.
constexpr int64_t kLargestCluster = 8 * 4096 + 1;

template <typename T>
void test_type() {
  for (int64_t dim : kDims)
    for (int64_t rows : {0, 1, int{kKinds}}) {
      for (bool diagonal : {false, true})
        if (dim > 1 || (dim == 1 && !diagonal)) test_cg<T>(rows, dim, diagonal, false);
      if (dim > 0) test_cg<T>(rows, dim, /*diagonal=*/dim > 1 && dim % 2 == 1, true);
    }
  for (bool preconditioned : {false, true}) {
    test_cg<T>(1, kManyBlocks, true, preconditioned);
    test_cg<T>(1, kLargestCluster, !preconditioned, preconditioned);
  }
  shim::cluster_limits = kDevices[0];
  for (int64_t dim : {5, 100, 5000})
    for (bool jacobi : {false, true}) test_solve<T>(dim, jacobi);
}

}  // namespace

void test_cg_step() {
  test_direction();
  test_forms();
  test_type<float>();
  test_type<double>();
}

}  // namespace imaml
