// Proximal problems, and the results of the steps and row sums on them, in float64.
#pragma once
#include "cuda/prox_step.cuh"
#include "cuda/pull_back.cuh"
#include "cuda/row_sums.cuh"
#include "operands.h"

namespace imaml {

enum Rule { kPlain, kMomentum, kNesterov, kAdam, kRules };

template <typename T>
struct Problem {
  int64_t rows, dim;
  std::vector<T> phi, grad, theta, lam;
  std::vector<std::int32_t> status;  // empty: every row is updated
  T lr = T(0.1), momentum = T(0.9);
  AdamSettings adam{/*lr=*/0.05, /*beta1=*/0.9, /*beta2=*/0.99, /*eps=*/0.1, /*step=*/3};

  Problem(int64_t rows, int64_t dim, bool diagonal, std::uint64_t seed) : rows(rows), dim(dim) {
    phi = normal<T>(rows * dim, seed);
    grad = normal<T>(rows * dim, seed + 1);
    theta = normal<T>(dim, seed + 3);
    lam = normal<T>(diagonal ? dim : 1, seed + 4);
    status.assign(at(rows), kRunning);
    for (int64_t row = 1; row < rows; row += 3) status[at(row)] = kConverged;
  }

  // For element j: its lam, phi - theta, its gradient, and whether its row is updated.
  double lam_at(int64_t j) const { return double(lam[lam.size() == 1 ? 0 : at(j % dim)]); }
  double displacement(int64_t j) const { return double(phi[at(j)]) - double(theta[at(j % dim)]); }
  double gradient(int64_t j) const { return double(grad[at(j)]) + lam_at(j) * displacement(j); }
  bool is_updated(int64_t j) const { return status.empty() || status[at(j / dim)] == kRunning; }

  // The sum of the magnitudes of the gradient's terms.
  double size(int64_t j) const {
    return std::abs(double(grad[at(j)])) +
           std::abs(lam_at(j)) *
               (std::abs(double(phi[at(j)])) + std::abs(double(theta[at(j % dim)])));
  }

  ProxArgs<T> args(const T* moved, Operands& operands) const {
    ProxArgs<T> a{};
    a.phi = const_cast<T*>(moved);
    a.grad = operands.in(grad);
    a.theta = operands.in(theta);
    a.lam = operands.in(lam);
    a.lam_stride = lam.size() == 1 ? 0 : 1;
    a.status = operands.in_or_null(status);
    a.rows = rows;
    a.dim = dim;
    return a;
  }
};

// What a step writes: phi, and the buffers of its rule (Adam has two).
template <typename T>
struct State {
  std::vector<T> phi, first, second;

  State(const Problem<T>& problem, std::uint64_t seed)
      : phi(problem.phi),
        first(normal<T>(problem.rows * problem.dim, seed)),
        second(normal<T>(problem.rows * problem.dim, seed + 1)) {
    for (T& value : second) value = value * value + T(0.1);
  }
  bool same(const State& o) const {
    return same_bits(phi, o.phi) && same_bits(first, o.first) && same_bits(second, o.second);
  }
};

// Runs step(args, rule) on copies of the operands and returns the new state.
template <typename T, typename Step>
State<T> run_step(const Problem<T>& problem, Rule rule, State<T> state, std::size_t offset,
                  const Step& step) {
  Operands operands(offset);
  const ProxArgs<T> args = problem.args(operands.out(state.phi), operands);
  if (rule == kAdam)
    step(args, Adam<T>(operands.out(state.first), operands.out(state.second), problem.adam));
  else
    step(args, Descent<T>{rule == kPlain ? nullptr : operands.out(state.first), problem.lr,
                          problem.momentum, rule == kNesterov});
  operands.copy_back();
  return state;
}

template <typename T, typename ParallelFor = cpu::Serial>
State<T> cpu_prox_step(const Problem<T>& problem, Rule rule, const State<T>& state, int threads = 1,
                       const ParallelFor& parallel_for = {}, std::size_t offset = 0) {
  return run_step(problem, rule, state, offset, [&](const ProxArgs<T>& args, const auto& how) {
    cpu::prox_step(args, how, threads, parallel_for);
  });
}

template <typename T>
State<T> cuda_prox_step(const Problem<T>& problem, Rule rule, const State<T>& state,
                        std::size_t offset = 0) {
  return run_step(problem, rule, state, offset, [&](const ProxArgs<T>& args, const auto& how) {
    cuda::prox_step(args, how, nullptr);
  });
}

// The decrease of phi, and the new entries of the buffers.
struct Move {
  double length, first, second;
};

template <typename T>
Move expected_move(const Problem<T>& problem, Rule rule, double g, double first, double second) {
  const double lr = double(problem.lr), mu = double(problem.momentum);
  if (rule == kPlain) return {lr * g, first, second};
  if (rule != kAdam) {
    first = mu * first + g;
    return {lr * (rule == kNesterov ? g + mu * first : first), first, second};
  }
  const AdamSettings& s = problem.adam;
  first = s.beta1 * first + (1 - s.beta1) * g;
  second = s.beta2 * second + (1 - s.beta2) * g * g;
  const double mean = first / (1 - std::pow(s.beta1, s.step));
  const double square = second / (1 - std::pow(s.beta2, s.step));
  return {s.lr * mean / (std::sqrt(square) + s.eps), first, second};
}

// Checks element j of a step from `before` to `got`.
template <typename T>
void check_move(const Problem<T>& problem, Rule rule, const State<T>& before, const State<T>& got,
                int64_t j, const char* what) {
  const double phi = double(before.phi[at(j)]), size = problem.size(j);
  Move move{0, double(before.first[at(j)]), double(before.second[at(j)])};
  const double others = 16 + size + (rule == kPlain ? 0 : std::abs(move.first));
  if (problem.is_updated(j))
    move = expected_move(problem, rule, problem.gradient(j), move.first, move.second);
  expect_close<T>(double(got.phi[at(j)]), phi - move.length, std::abs(phi) + others, what);
  expect_close<T>(double(got.first[at(j)]), move.first, others, what);
  expect_close<T>(double(got.second[at(j)]), move.second, 16 + move.second + size * size, what);
}

template <typename T>
void check_step(const Problem<T>& problem, Rule rule, const State<T>& before, const State<T>& got,
                const char* what) {
  for (int64_t j = 0; j < problem.rows * problem.dim; ++j)
    check_move(problem, rule, before, got, j, what);
}

// The results of prox_norms and row_dot(phi, grad).
struct RowSums {
  std::vector<double> norms, dots;  // [rows, 2], [rows]
  explicit RowSums(int64_t rows) : norms(at(2 * rows), -1), dots(at(rows), -1) {}
  bool same(const RowSums& o) const { return same_bits(norms, o.norms) && same_bits(dots, o.dots); }
};

template <typename T, typename ParallelFor = cpu::Serial>
RowSums cpu_sums(const Problem<T>& problem, int threads = 1, const ParallelFor& parallel_for = {},
                 std::size_t offset = 0) {
  RowSums sums(problem.rows);
  Operands operands(offset);
  const ProxArgs<T> args = problem.args(operands.in(problem.phi), operands);
  cpu::prox_norms(args, operands.out(sums.norms), threads, parallel_for);
  cpu::row_dot<T>(args.phi, args.grad, operands.out(sums.dots), problem.rows, problem.dim, threads,
                  parallel_for);
  operands.copy_back();
  return sums;
}

template <typename T>
RowSums cuda_sums(const Problem<T>& problem, std::size_t offset = 0) {
  const int64_t rows = problem.rows, dim = problem.dim;
  RowSums sums(rows);
  std::vector<double> two(at(cuda::row_sums_workspace<2>(rows, dim)), NAN);
  std::vector<double> one(at(cuda::row_sums_workspace<1>(rows, dim)), NAN);
  Operands operands(offset);
  const ProxArgs<T> args = problem.args(operands.in(problem.phi), operands);
  cuda::prox_norms(args, operands.out(sums.norms), operands.out(two), nullptr);
  cuda::row_dot<T>(args.phi, args.grad, operands.out(sums.dots), operands.out(one), rows, dim,
                   nullptr);
  operands.copy_back();
  return sums;
}

// The sums of pull_back with x = grad; the rows are used in turn not at all, for x, and for both.
template <typename T, typename Run>
std::vector<T> pull_back_sums(const Problem<T>& problem, const Run& run) {
  std::vector<T> sums(at(2 * problem.dim), T(NAN)), weight{T(0.37)};
  std::vector<std::int32_t> use(at(problem.rows));
  for (int64_t row = 0; row < problem.rows; ++row) use[at(row)] = static_cast<int>(row % 3);
  Operands operands(0);
  PullBackArgs<T> args{};
  args.x = operands.in(problem.grad);
  args.phi = operands.in(problem.phi);
  args.theta = operands.in(problem.theta);
  args.weight = operands.in(weight);
  args.use = operands.in(use);
  args.sums = operands.out(sums);
  args.rows = problem.rows;
  args.dim = problem.dim;
  run(args);
  operands.copy_back();
  return sums;
}

template <typename T>
void check_pull_back(const Problem<T>& problem, const std::vector<T>& got, const char* what) {
  const double weight = double(T(0.37));
  for (int64_t i = 0; i < problem.dim; ++i) {
    double sum = 0, product = 0, size = 0, product_size = 0;
    for (int64_t row = 0; row < problem.rows; ++row) {
      const int64_t j = row * problem.dim + i;
      const double x = row % 3 > 0 ? weight * double(problem.grad[at(j)]) : 0;
      const double displacement = row % 3 == 2 ? problem.displacement(j) : 0;
      sum += x;
      size += std::abs(x);
      product += x * displacement;
      product_size += std::abs(x) * (std::abs(double(problem.phi[at(j)])) +
                                     std::abs(double(problem.theta[at(i)])));
    }
    expect_close<T>(double(got[at(i)]), sum, size, what);
    expect_close<T>(double(got[at(problem.dim + i)]), product, product_size, what);
  }
}

template <typename T>
void check_sums(const Problem<T>& problem, int64_t row, const RowSums& got) {
  long double norm2 = 0, norm2_size = 0, penalty = 0, penalty_size = 0, dot = 0, dot_size = 0;
  for (int64_t j = row * problem.dim; j < (row + 1) * problem.dim; ++j) {
    const long double g = problem.gradient(j), d = problem.displacement(j), size = problem.size(j);
    const long double product = static_cast<long double>(problem.phi[at(j)]) * problem.grad[at(j)];
    norm2 += g * g;
    norm2_size += size * size;
    penalty += problem.lam_at(j) * d * d;
    penalty_size += std::abs(problem.lam_at(j) * d * d);
    dot += product;
    dot_size += std::abs(product);
  }
  expect_close<T>(got.norms[at(2 * row)], norm2, norm2_size, "gradient norm");
  expect_close<T>(got.norms[at(2 * row + 1)], penalty, penalty_size, "penalty");
  expect_close<double>(got.dots[at(row)], dot, 10 * dot_size, "dot");
}

}  // namespace imaml
