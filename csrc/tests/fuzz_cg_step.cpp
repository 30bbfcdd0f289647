// cg_step on rows with every outcome, and on rows with arbitrary values.
#include "cg_oracle.h"
#include "fuzz.h"

namespace imaml {
namespace {

template <typename T>
CgState<T> only(const CgState<T>& state, int64_t row) {
  CgState<T> one = state;
  one.rows = 1;
  one.kinds = part(state.kinds, row, 1);
  for (auto vector : {&CgState<T>::x, &CgState<T>::r, &CgState<T>::p, &CgState<T>::hp})
    one.*vector = part(state.*vector, row, state.dim);
  for (auto vector :
       {&CgState<T>::rr, &CgState<T>::tol2, &CgState<T>::curvature, &CgState<T>::beta})
    one.*vector = part(state.*vector, row, 1);
  one.status = part(state.status, row, 1);
  one.steps = part(state.steps, row, 1);
  if (state.preconditioned()) {
    one.inverse = part(state.inverse, row, state.dim);
    one.rz = part(state.rz, row, 1);
  }
  return one;
}

template <typename T>
void corrupt(Draw& draw, CgState<T>& state) {
  for (int64_t row = 0; row < state.rows; ++row) {
    for (auto vector :
         {&CgState<T>::x, &CgState<T>::r, &CgState<T>::p, &CgState<T>::hp, &CgState<T>::inverse})
      if (!(state.*vector).empty())
        draw.corrupt((state.*vector).data() + row * state.dim, state.dim);
    for (auto vector : {&CgState<T>::rr, &CgState<T>::rz, &CgState<T>::tol2})
      if (!(state.*vector).empty() && draw.chance(0.3))
        draw.corrupt((state.*vector).data() + row, 1);
    state.status[at(row)] = draw.chance(0.8) ? kRunning : int(draw.from(0, 4));
    state.steps[at(row)] = int(draw.from(0, 2));
  }
  if (draw.chance(0.3)) draw.corrupt(state.lam.data(), static_cast<int64_t>(state.lam.size()));
  if (draw.chance(0.3)) draw.corrupt(&state.damping, 1);
}

// The sums that decide the step of a row, in long double.
template <typename T>
struct Totals {
  long double pap = 0, size = 0, apap = 0;
  bool finite = true;    // all operands
  long double most = 0;  // the largest magnitude that is rounded to T

  Totals(const CgState<T>& state, int64_t row) {
    for (int64_t i = 0; i < state.dim; ++i) {
      const long double p = state.p[at(row * state.dim + i)];
      const long double hp = state.hp[at(row * state.dim + i)];
      const long double lam = state.lam[state.lam.size() == 1 ? 0 : at(i)];
      const long double weight = lam + static_cast<long double>(state.damping);
      const long double ap = hp + weight * p;
      finite = finite && std::isfinite(hp) && std::isfinite(p) && std::isfinite(weight);
      pap += p * ap;
      apap += ap * ap;
      size += std::abs(p) * (std::abs(hp) + std::abs(weight * p));
      for (const long double one : {hp, weight, weight * p, ap})
        most = std::max(most, std::abs(one));
    }
  }

  // These are certain; in between, rounding decides.
  bool overflow() const { return !finite || apap > 2 * kMost<double>; }
  bool within_range() const {
    return finite && most < kMost<T> / 2 && size < kMost<double> / 2 && apap < kMost<double> / 2;
  }
  bool negative() const {
    return within_range() && pap < -1e-5L * size && -pap > 1e-25L && most < 1e30L;
  }

  template <typename Number>
  static constexpr long double kMost = std::numeric_limits<Number>::max();
};

template <typename T>
bool finite(const std::vector<T>& values) {
  return range_of(values.data(), static_cast<int64_t>(values.size())).finite;
}

// Checks a state of one row with arbitrary values.
template <typename T>
void check_outcome(const CgState<T>& before, const CgState<T>& got) {
  const std::int32_t status = got.status[0];
  const bool stepped = got.steps[0] == before.steps[0] + 1,
             preconditioned = before.preconditioned();
  expect(stepped || got.steps[0] == before.steps[0], "steps");
  if (before.status[0] != kRunning) {
    CgState<T> still = before;
    still.curvature[0] = still.beta[0] = 0;
    return expect(got.same(still), "a frozen row has changed");
  }
  const Totals<T> totals(before, 0);
  if (totals.overflow()) expect(status == kNonfinite, "sums are not finite, and the row continues");
  if (totals.negative())
    expect(status == kNegativeCurvature || (status == kNonfinite && before.steps[0] == 0),
           "negative curvature is not detected");
  expect(stepped == (status == kRunning || status == kConverged), "steps");
  if (status != kRunning)
    expect(same_bits(got.p, before.p), "p of a row that has ended has changed");
  if (status == kNonfinite) {
    expect(same_bits(got.x, std::vector<T>(before.x.size())), "x of a row that is not finite");
    expect(std::isnan(got.rr[0]) && got.beta[0] == 0, "rr and beta of a row that is not finite");
    if (preconditioned) expect(std::isnan(got.rz[0]), "rz of a row that is not finite");
    return;
  }
  if (finite(before.x)) expect(finite(got.x), "x is not finite, and the status is not NONFINITE");
  if (status == kNegativeCurvature) {
    expect(same_bits(got.r, before.r) && same_bits(got.rr, before.rr), "r has changed");
    if (before.steps[0] > 0) expect(same_bits(got.x, before.x), "x has changed");
    return expect(same_bits(got.rz, before.rz) && got.beta[0] == 0, "rz and beta");
  }
  if (status != kRunning && status != kConverged) return expect(false, "an impossible status");
  const double tol2 = before.tol2[0];
  expect((got.rr[0] <= tol2) == (status == kConverged), "convergence differs from r.r <= tol2");
  long double rr = 0, rz = 0, rz_size = 0;
  for (std::size_t i = 0; i < got.r.size(); ++i) {
    const long double r = got.r[i], z = preconditioned ? got.inverse[i] * got.r[i] : got.r[i];
    rr += r * r;
    rz += r * z;
    rz_size += std::abs(r * z);
  }
  expect_close<float>(got.rr[0], rr, rr, "rr");
  // r.z of a converged row may have overflowed.
  if (preconditioned && rz_size < Totals<T>::template kMost<double> / 2)
    expect_close<float>(got.rz[0], rz, rz_size, "rz");
}

template <typename T>
void check(const CgState<T>& before, const CgState<T>& got, bool corrupted) {
  if (!corrupted) return check_cg(before, got);
  for (int64_t row = 0; row < before.rows; ++row) check_outcome(only(before, row), only(got, row));
}

}  // namespace

template <typename T>
void fuzz_cg_step(Draw& draw) {
  const bool emulated = kEmulates && draw.chance(0.15);
  const bool corrupted = draw.chance(0.6), preconditioned = draw.chance(0.4);
  const int64_t dim = std::max<int64_t>(corrupted ? 0 : 1, draw.dim());
  const int64_t rows = draw.from(0, dim > 300 ? 3 : emulated ? 4 : 12);
  const bool diagonal = dim != 1 && draw.chance(0.5);
  std::vector<Kind> kinds(at(rows));
  for (Kind& kind : kinds) kind = static_cast<Kind>(draw.from(0, kKinds - 1));
  CgState<T> before(kinds, dim, diagonal, preconditioned && dim > 0, draw.seed());
  if (corrupted) corrupt(draw, before);
  const int64_t row = rows > 0 ? draw.from(0, rows - 1) : 0;
  const std::string name = name_of<T>("cg_step", rows, dim) + (diagonal ? " diagonal" : "") +
                           (preconditioned ? " preconditioned" : "") +
                           (corrupted ? " corrupted" : "");
  ++tried[preconditioned ? "cg_step, preconditioned" : "cg_step"];

  context = name + " cpu";
  const CgState<T> serial = cpu_step(before, 1, cpu::Serial{}, draw.offset());
  check(before, serial, corrupted);
  on_threads(draw, [&](int threads, const Threads& pool) {
    return cpu_step(before, threads, pool, draw.offset()).same(serial);
  });
  if (rows > 0)
    expect(cpu_step(only(before, row)).same(only(serial, row)), "a row changes another's bits");

  if (!emulated) return;
  ++tried["cg_step, emulated CUDA"];
  constexpr shim::Order kOrders[] = {shim::Order::kForwards, shim::Order::kBackwards,
                                     shim::Order::kShuffled, shim::Order::kWarpByWarp,
                                     shim::Order::kLastWarpFirst};
  shim::device = draw.one_of(kDevices);
  shim::order = draw.one_of(kOrders);
  context = name + " cuda, order " + std::to_string(static_cast<int>(shim::order)) + ", blocks " +
            std::to_string(form_on<T>(shim::device, rows, dim).blocks);
  const CgState<T> device = cuda_step(before, draw.offset());
  check(before, device, corrupted);
  shim::order = draw.one_of(kOrders);
  expect(cuda_step(before).same(device), "the order of threads changes the bits: a race");
  if (rows > 0)
    expect(cuda_step(only(before, row)).same(only(device, row)), "a row changes another's bits");
}

template void fuzz_cg_step<float>(Draw&);
template void fuzz_cg_step<double>(Draw&);

}  // namespace imaml
