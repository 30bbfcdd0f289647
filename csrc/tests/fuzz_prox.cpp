// The proximal steps and the row sums on arbitrary values.
#include "fuzz.h"
#include "prox_oracle.h"

namespace imaml {
namespace {

template <typename T>
Problem<T> only(const Problem<T>& problem, int64_t row) {
  Problem<T> one = problem;
  one.rows = 1;
  one.phi = part(problem.phi, row, problem.dim);
  one.grad = part(problem.grad, row, problem.dim);
  if (!problem.status.empty()) one.status = part(problem.status, row, 1);
  return one;
}

template <typename T>
State<T> only(const Problem<T>& problem, const State<T>& state, int64_t row) {
  State<T> one = state;
  for (auto vector : {&State<T>::phi, &State<T>::first, &State<T>::second})
    one.*vector = part(state.*vector, row, problem.dim);
  return one;
}

template <typename T>
Problem<T> drawn_problem(Draw& draw, bool emulated) {
  const int64_t dim = draw.dim(), rows = draw.from(0, dim > 300 ? 3 : emulated ? 4 : 12);
  Problem<T> problem(rows, dim, /*diagonal=*/dim != 1 && draw.chance(0.5), draw.seed());
  for (std::int32_t& status : problem.status)
    status = draw.chance(0.7) ? kRunning : int(draw.from(0, 4));
  if (draw.chance(0.2)) problem.status.clear();
  if (draw.chance(0.5)) return problem;
  for (int64_t row = 0; row < rows; ++row)
    for (auto* values : {&problem.phi, &problem.grad})
      draw.corrupt(values->data() + row * dim, dim);
  for (auto* values : {&problem.theta, &problem.lam})
    if (draw.chance(0.2)) draw.corrupt(values->data(), static_cast<int64_t>(values->size()));
  return problem;
}

// The range of the operands of element j's gradient.
template <typename T>
Range range_at(const Problem<T>& problem, int64_t j) {
  Range range;
  range &= problem.phi[at(j)];
  range &= problem.grad[at(j)];
  range &= problem.theta[at(j % problem.dim)];
  return range &= problem.lam[problem.lam.size() == 1 ? 0 : at(j % problem.dim)];
}

template <typename T>
void check_updates(const Problem<T>& problem, Rule rule, const State<T>& before,
                   const State<T>& got) {
  for (int64_t row = 0; row < problem.rows; ++row)
    if (problem.dim > 0 && !problem.is_updated(row * problem.dim))
      expect(only(problem, got, row).same(only(problem, before, row)), "a frozen row has changed");
  for (int64_t j = 0; j < problem.rows * problem.dim; ++j) {
    if (!problem.is_updated(j)) continue;
    const Range gradient = range_at(problem, j);
    Range buffers;
    if (rule != kPlain) buffers &= before.first[at(j)];
    if (rule == kAdam) buffers &= before.second[at(j)];
    if (gradient.moderate && buffers.moderate)
      check_move(problem, rule, before, got, j, "step");
    else if (!gradient.finite)
      expect(!std::isfinite(got.phi[at(j)]), "a gradient is not finite, but its result is");
  }
}

}  // namespace

template <typename T>
void fuzz_prox_step(Draw& draw) {
  const bool emulated = kEmulates && draw.chance(0.15);
  Problem<T> problem = drawn_problem<T>(draw, emulated);
  problem.lr = draw.one_of({T(0.1), T(0), T(1)});
  problem.momentum = draw.one_of({T(0.9), T(0), T(0.5)});
  problem.adam.step = draw.from(1, 1000);
  const Rule rule = static_cast<Rule>(draw.from(0, kRules - 1));
  const int64_t rows = problem.rows, dim = problem.dim;
  State<T> before(problem, draw.seed());
  for (int64_t row = 0; row < rows && draw.chance(0.7); ++row) {
    draw.corrupt(before.first.data() + row * dim, dim);
    draw.corrupt(before.second.data() + row * dim, dim);
  }
  for (T& value : before.second) value = std::abs(value);
  const int64_t row = rows > 0 ? draw.from(0, rows - 1) : 0;
  constexpr const char* kNames[] = {"prox_gd", "prox_gd, momentum", "prox_gd, nesterov",
                                    "prox_adam"};
  ++tried[kNames[rule]];

  context = name_of<T>(kNames[rule], rows, dim) + " cpu";
  const State<T> serial = cpu_prox_step(problem, rule, before, 1, cpu::Serial{}, draw.offset());
  check_updates(problem, rule, before, serial);
  on_threads(draw, [&](int threads, const Threads& pool) {
    return cpu_prox_step(problem, rule, before, threads, pool, draw.offset()).same(serial);
  });
  if (rows > 0)
    expect(cpu_prox_step(only(problem, row), rule, only(problem, before, row))
               .same(only(problem, serial, row)),
           "a row changes another's bits");

  if (!emulated) return;
  ++tried[std::string(kNames[rule]) + ", emulated CUDA"];
  context = name_of<T>(kNames[rule], rows, dim) + " cuda";
  shim::order = draw.chance(0.5) ? shim::Order::kForwards : shim::Order::kShuffled;
  check_updates(problem, rule, before, cuda_prox_step(problem, rule, before, draw.offset()));
}

template <typename T>
void fuzz_row_sums(Draw& draw) {
  const bool emulated = kEmulates && draw.chance(0.15);
  const Problem<T> problem = drawn_problem<T>(draw, emulated);
  const int64_t rows = problem.rows, dim = problem.dim;
  const auto check = [&](const RowSums& got) {
    for (int64_t row = 0; row < rows; ++row) {
      Range all;
      for (int64_t j = row * dim; j < (row + 1) * dim; ++j) {
        const Range one = range_at(problem, j);
        all.finite = all.finite && one.finite;
        all.moderate = all.moderate && one.moderate;
      }
      if (all.moderate) check_sums(problem, row, got);
      if (!all.finite)
        expect(!std::isfinite(got.norms[at(2 * row)]),
               "a gradient is not finite, but its result is");
    }
  };
  const int64_t row = rows > 0 ? draw.from(0, rows - 1) : 0;
  ++tried["prox_norms and row_dot"];

  context = name_of<T>("sums", rows, dim) + " cpu";
  const RowSums serial = cpu_sums(problem, 1, cpu::Serial{}, draw.offset());
  check(serial);
  on_threads(draw, [&](int threads, const Threads& pool) {
    return cpu_sums(problem, threads, pool, draw.offset()).same(serial);
  });
  const auto alone = [&](const RowSums& one, const RowSums& all) {
    expect(same_bits(one.norms, part(all.norms, row, 2)) &&
               same_bits(one.dots, part(all.dots, row, 1)),
           "a row changes another's bits");
  };
  if (rows > 0) alone(cpu_sums(only(problem, row)), serial);

  if (!emulated) return;
  ++tried["prox_norms and row_dot, emulated CUDA"];
  context = name_of<T>("sums", rows, dim) + " cuda";
  shim::order = draw.chance(0.5) ? shim::Order::kWarpByWarp : shim::Order::kShuffled;
  const RowSums device = cuda_sums(problem, draw.offset());
  check(device);
  shim::order = shim::Order::kBackwards;
  expect(cuda_sums(problem).same(device), "the order of threads changes the bits: a race");
  if (rows > 0) alone(cuda_sums(only(problem, row)), device);
}

template void fuzz_prox_step<float>(Draw&);
template void fuzz_prox_step<double>(Draw&);
template void fuzz_row_sums<float>(Draw&);
template void fuzz_row_sums<double>(Draw&);

}  // namespace imaml
