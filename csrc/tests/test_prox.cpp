// The proximal steps and the row sums.
#include "prox_oracle.h"

namespace imaml {
namespace {

template <typename T>
void test_step(const Problem<T>& problem, Rule rule) {
  context = name_of<T>(rule == kAdam ? "prox_adam" : "prox_gd", problem.rows, problem.dim) +
            (problem.lam.size() > 1 ? " diagonal" : "");
  const State<T> before(problem, 11), serial = cpu_prox_step(problem, rule, before);
  check_step(problem, rule, before, serial, "cpu");
  expect(cpu_prox_step(problem, rule, before, 5, Threads{5}).same(serial),
         "the number of threads changes the bits");
  check_step(problem, rule, before, cuda_prox_step(problem, rule, before), "cuda");
}

template <typename T>
void test_sums(const Problem<T>& problem) {
  context = name_of<T>("sums", problem.rows, problem.dim);
  const RowSums serial = cpu_sums(problem);
  expect(cpu_sums(problem, 5, Threads{5}).same(serial),
         "the number of threads changes a sum's bits");
  for (auto order : {shim::Order::kForwards, shim::Order::kShuffled}) {
    shim::order = order;
    const RowSums device = cuda_sums(problem);
    for (int64_t row = 0; row < problem.rows; ++row)
      for (const RowSums* got : {&serial, &device}) check_sums(problem, row, *got);
  }
}

template <typename T>
void test_pull_back(const Problem<T>& problem) {
  context = name_of<T>("pull_back", problem.rows, problem.dim);
  const auto on = [&](const auto& parallel_for) {
    return pull_back_sums(problem, [&](const auto& args) { cpu::pull_back(args, parallel_for); });
  };
  const std::vector<T> serial = on(cpu::Serial{});
  check_pull_back(problem, serial, "cpu");
  expect(same_bits(on(Threads{5}), serial), "the number of threads changes a sum's bits");
  check_pull_back(problem,
                  pull_back_sums(problem, [](const auto& args) { cuda::pull_back(args, nullptr); }),
                  "cuda");
}

template <typename T>
void test_all(int64_t rows, int64_t dim, bool diagonal) {
  const Problem<T> problem(rows, dim, diagonal, static_cast<std::uint64_t>(rows * 7919 + dim));
  const bool momentum = dim % 2 == 1, nesterov = diagonal;
  test_step(problem, !momentum ? kPlain : nesterov ? kNesterov : kMomentum);
  test_step(problem, kAdam);
  test_sums(problem);
  test_pull_back(problem);
}

template <typename T>
void test_type() {
  for (int64_t dim : kDims)
    for (int64_t rows : {0, 1, 8})
      for (bool diagonal : {false, true}) test_all<T>(rows, dim, diagonal && dim > 1);
  test_all<T>(1, kManyBlocks, false);
}

}  // namespace

void test_prox() {
  test_type<float>();
  test_type<double>();
}

}  // namespace imaml
