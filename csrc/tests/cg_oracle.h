// Initial states for cg_step, with one kind of row for every outcome of an iteration, and the
// expected result of an iteration, in float64.
#pragma once
#include "cuda/cg_step.cuh"
#include "operands.h"

namespace imaml {

// The outcome of the iteration for a row.
enum Kind {
  kHealthy,
  kFrozen,
  kNegativeFirst,
  kNegativeLater,
  kNanProduct,
  kConverges,
  kInfiniteNorm,
  kOverflows,   // alpha is finite in float64, x or r.r is not finite in T
  kIndefinite,  // M^-1 is negative, and so is the new r.z; healthy without a preconditioner
  kKinds
};

inline std::vector<Kind> kinds_in_turn(int64_t rows) {
  std::vector<Kind> kinds(at(rows));
  for (int64_t row = 0; row < rows; ++row) kinds[at(row)] = static_cast<Kind>(row % kKinds);
  return kinds;
}

template <typename T>
struct CgState {
  int64_t rows, dim;
  std::vector<Kind> kinds;  // [rows]
  std::vector<T> x, r, p, hp, lam;
  T damping = T(0.25);
  std::vector<double> rr, tol2, curvature, beta;
  std::vector<std::int32_t> status, steps;
  std::vector<T> inverse;  // empty without a preconditioner, and so is rz
  std::vector<double> rz;

  CgState(int64_t rows, int64_t dim, bool diagonal, bool preconditioned)
      : CgState(kinds_in_turn(rows), dim, diagonal, preconditioned,
                static_cast<std::uint64_t>(rows * 100003 + dim)) {}

  CgState(std::vector<Kind> kinds_of_rows, int64_t dim, bool diagonal, bool preconditioned,
          std::uint64_t seed)
      : rows(static_cast<int64_t>(kinds_of_rows.size())),
        dim(dim),
        kinds(std::move(kinds_of_rows)) {
    x = normal<T>(rows * dim, seed + 1);
    r = normal<T>(rows * dim, seed + 2);
    p = normal<T>(rows * dim, seed + 3);
    hp = normal<T>(rows * dim, seed + 4);
    lam = normal<T>(diagonal ? dim : 1, seed + 5);
    for (T& value : lam) value = std::abs(value) + T(0.5);
    for (int64_t i = 0; i < rows * dim; ++i)  // H is close to 2 I, so that p.Ap > 0
      hp[at(i)] = (T(2) + T(0.01) * hp[at(i)]) * p[at(i)];
    rr.assign(at(rows), 0);
    tol2.assign(at(rows), 0);
    curvature.assign(at(rows), -7);
    beta.assign(at(rows), -7);
    status.assign(at(rows), kRunning);
    steps.assign(at(rows), 3);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < dim; ++i)
        rr[at(row)] += double(r[at(row * dim + i)]) * double(r[at(row * dim + i)]);
      const Kind kind = kinds[at(row)];
      T* h = hp.data() + row * dim;
      if (kind == kFrozen) status[at(row)] = kConverged;
      if (kind == kNegativeFirst) steps[at(row)] = 0;
      if (kind == kNegativeFirst || kind == kNegativeLater)
        for (int64_t i = 0; i < dim; ++i) h[i] = T(-50) * p[at(row * dim + i)];
      if (kind == kNanProduct && dim > 0) h[dim / 2] = static_cast<T>(NAN);
      if (kind == kConverges) tol2[at(row)] = 1e30;
      if (kind == kInfiniteNorm) rr[at(row)] = INFINITY;
      if (kind == kOverflows) rr[at(row)] = sizeof(T) == 4 ? 1e76 : 1e300;
    }
    if (preconditioned) precondition(normal<T>(rows * dim, seed + 6));
  }

  void precondition(std::vector<T> values) {
    inverse = std::move(values);
    rz = rr;  // kept for rows where it is not finite or too large
    for (int64_t row = 0; row < rows; ++row) {
      const Kind kind = kinds[at(row)];
      if (kind != kInfiniteNorm && kind != kOverflows) rz[at(row)] = 0;
      for (int64_t j = row * dim; j < (row + 1) * dim; ++j) {
        inverse[at(j)] = std::abs(inverse[at(j)]) + T(0.5);
        rz[at(row)] += double(r[at(j)]) * double(inverse[at(j)]) * double(r[at(j)]);
        if (kind == kIndefinite) inverse[at(j)] = -inverse[at(j)];
      }
    }
  }

  bool preconditioned() const { return !inverse.empty(); }

  CgArgs<T> args(Operands& operands) {
    CgArgs<T> a{};
    a.x = operands.out(x);
    a.r = operands.out(r);
    a.p = operands.out(p);
    a.hp = operands.in(hp);
    a.lam = operands.in(lam);
    a.lam_stride = lam.size() == 1 ? 0 : 1;
    a.damping = damping;
    a.inverse = preconditioned() ? operands.in(inverse) : nullptr;
    a.rr = operands.out(rr);
    a.rz = preconditioned() ? operands.out(rz) : nullptr;
    a.tol2 = operands.in(tol2);
    a.status = operands.out(status);
    a.steps = operands.out(steps);
    a.curvature = operands.out(curvature);
    a.beta = operands.out(beta);
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

template <typename T, typename ParallelFor = cpu::Serial>
CgState<T> cpu_step(CgState<T> state, int threads = 1, const ParallelFor& parallel_for = {},
                    std::size_t offset = 0) {
  Operands operands(offset);
  cpu::cg_step(state.args(operands), threads, parallel_for);
  operands.copy_back();
  return state;
}

// Devices: compute capability 9.0, idle and with room for few clusters; the same without clusters
// of 16 blocks; 8.0; one on which no row fits.
constexpr int64_t kHopper = 227 * 1024;
constexpr shim::Device kDevices[] = {
    {{264, 132, 66, 32, 16}, {kHopper, kHopper, kHopper, kHopper, kHopper}},
    {{264, 132, 66, 8, 1}, {kHopper, kHopper, kHopper, kHopper, kHopper}},
    {{264, 132, 66, 32, 0}, {kHopper, kHopper, kHopper, kHopper, 0}},
    {{108, 0, 0, 0, 0}, {163 * 1024, 0, 0, 0, 0}},
    {}};

template <typename T>
cuda::CgForm form_on(const shim::Device& device, int64_t rows, int64_t dim) {
  shim::device = device;
  return cuda::cg_form<T>(rows, dim, [](int blocks, int64_t bytes) {
    return cuda::cluster_capacity(nullptr, blocks, bytes);
  });
}

// On the device that shim::device describes.
template <typename T>
CgState<T> cuda_step(CgState<T> state, std::size_t offset = 0) {
  Operands operands(offset);
  const CgArgs<T> args = state.args(operands);
  std::vector<double> workspace(at(cuda::cg_workspace(args)), NAN);
  cuda::cg_step(args, operands.out(workspace), nullptr);
  operands.copy_back();
  return state;
}

// Compares `got` with one CG iteration on `before`, computed here in float64.
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
    const Kind kind = before.kinds[at(row)];
    const bool preconditioned = before.preconditioned();
    const double rr = before.rr[at(row)], rz = preconditioned ? before.rz[at(row)] : rr;
    const bool steps = kind == kHealthy || kind == kConverges || kind == kIndefinite;
    const bool is_cleared = kind == kNanProduct || kind == kInfiniteNorm || kind == kOverflows ||
                            (kind == kIndefinite && preconditioned);
    const bool continues = steps && !is_cleared && kind != kConverges;
    const double alpha = steps ? static_cast<double>(rz / pap) : 0;
    const auto inverse = [&](std::size_t j) {
      return preconditioned ? double(before.inverse[j]) : 1.0;
    };
    long double rr_new = 0, rz_new = 0;
    for (int64_t i = 0; i < before.dim; ++i) {
      const std::size_t j = at(row * before.dim + i);
      const double r = double(before.r[j]) - (steps ? alpha * ap[at(i)] : 0);
      rr_new += r * r;
      rz_new += r * inverse(j) * r;
    }
    const double beta = steps && !is_cleared ? static_cast<double>(rz_new / rz) : 0;
    for (int64_t i = 0; i < before.dim; ++i) {
      const std::size_t j = at(row * before.dim + i);
      double x = double(before.x[j]) + alpha * double(p[i]);
      if (kind == kNegativeFirst) x += double(before.r[j]) / lam[at(i)];
      if (is_cleared) x = 0;
      const double change = steps ? alpha * ap[at(i)] : 0;
      const double r = double(before.r[j]) - change, z = inverse(j) * r;
      const double direction = continues ? z + beta * double(p[i]) : double(p[i]);
      expect_close<T>(double(got.x[j]), x, std::abs(x) + std::abs(double(before.x[j])) + 1, "x");
      if (kind != kOverflows)
        expect_close<T>(double(got.r[j]), r, std::abs(double(before.r[j])) + std::abs(change) + 1,
                        "r");
      expect_close<T>(double(got.p[j]), direction, 4 * (std::abs(z) + std::abs(double(p[i])) + 1),
                      "p");
    }
    const std::int32_t expected[kKinds] = {
        kRunning,           kConverged, kNegativeCurvature,
        kNegativeCurvature, kNonfinite, kConverged,
        kNonfinite,         kNonfinite, preconditioned ? kNonfinite : kRunning};
    expect(got.status[at(row)] == expected[kind], "status");
    expect(got.steps[at(row)] == before.steps[at(row)] + (steps && !is_cleared ? 1 : 0), "steps");
    expect_close<T>(got.beta[at(row)], beta, 8 * std::abs(beta) + 1, "beta");
    if (kind != kNanProduct && kind != kInfiniteNorm)
      expect_close<T>(got.curvature[at(row)], kind == kFrozen ? 0 : pap / rz, size / rz,
                      "curvature");
    expect_close<T>(got.rr[at(row)],
                    is_cleared ? NAN
                    : steps    ? rr_new
                               : rr,
                    4 * (rr + rr_new) + 1, "rr");
    if (preconditioned)
      expect_close<T>(got.rz[at(row)],
                      is_cleared ? NAN
                      : steps    ? rz_new
                                 : rz,
                      4 * (rz + rz_new) + 1, "rz");
    context = outer;
  }
}

}  // namespace imaml
