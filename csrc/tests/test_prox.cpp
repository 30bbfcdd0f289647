// The proximal steps, and the row sums.
#include "harness.h"
#include "kernels/prox_step.cuh"
#include "kernels/row_sums.cuh"

namespace imaml {
namespace {

template <typename T>
struct Problem {
  int64_t rows, dim;
  std::vector<T> phi, grad, theta, lam;
  std::vector<std::int32_t> status;

  Problem(int64_t rows, int64_t dim, bool diagonal) : rows(rows), dim(dim) {
    const unsigned seed = static_cast<unsigned>(rows * 7919 + dim);
    phi = normal<T>(rows * dim, seed);
    grad = normal<T>(rows * dim, seed + 1);
    theta = normal<T>(dim, seed + 3);
    lam = normal<T>(diagonal ? dim : 1, seed + 4);
    status.assign(at(rows), kRunning);
    for (int64_t row = 1; row < rows; row += 3) status[at(row)] = kConverged;
  }

  // The gradient at element j, the weight of its penalty, and whether its row moves.
  double lam_at(int64_t j) const { return double(lam[lam.size() > 1 ? at(j % dim) : 0]); }
  double away(int64_t j) const { return double(phi[at(j)]) - double(theta[at(j % dim)]); }
  double gradient(int64_t j) const { return double(grad[at(j)]) + lam_at(j) * away(j); }
  bool moves(int64_t j) const { return status[at(j / dim)] == kRunning; }

  ProxArgs<T> args(const std::vector<T>& moved) const {
    ProxArgs<T> a{};
    a.phi = const_cast<T*>(moved.data());
    a.grad = grad.data();
    a.theta = theta.data();
    a.lam = lam.data();
    a.lam_stride = lam.size() > 1 ? 1 : 0;
    a.status = status.data();
    a.rows = rows;
    a.dim = dim;
    return a;
  }
};

// What a step writes: phi, and the buffers of its rule, of which Adam has two.
template <typename T>
struct State {
  std::vector<T> phi, first, second;
  bool same(const State& o) const {
    return same_bits(phi, o.phi) && same_bits(first, o.first) && same_bits(second, o.second);
  }
};

// How far phi moves against its gradient, and the new entries of the buffers.
struct Move {
  double length, first, second;
};

// rule(state) is the rule under test on the state's buffers; want(g, first, second) the Move that
// it should make.
template <typename T, typename MakeRule, typename Oracle>
void test_step(const Problem<T>& problem, const char* kernel, const MakeRule& rule,
               const Oracle& want) {
  context =
      name_of<T>(kernel, problem.rows, problem.dim) + (problem.lam.size() > 1 ? " diagonal" : "");
  const int64_t count = problem.rows * problem.dim;
  State<T> before{problem.phi, normal<T>(count, 11), normal<T>(count, 12)};
  for (T& value : before.second) value = value * value + T(0.1);
  const auto check = [&](const State<T>& got, const char* what) {
    for (int64_t j = 0; j < count; ++j) {
      const double phi = double(before.phi[at(j)]);
      Move move{0, double(before.first[at(j)]), double(before.second[at(j)])};
      if (problem.moves(j)) move = want(problem.gradient(j), move.first, move.second);
      expect_close<T>(double(got.phi[at(j)]), phi - move.length, 16, what);
      expect_close<T>(double(got.first[at(j)]), move.first, 16, what);
      expect_close<T>(double(got.second[at(j)]), move.second, 16, what);
    }
  };
  State<T> serial = before, parallel = before, device = before;
  cpu::prox_step(problem.args(serial.phi), rule(serial), 1, cpu::Serial{});
  check(serial, "cpu");
  cpu::prox_step(problem.args(parallel.phi), rule(parallel), 5, Threads{5});
  expect(parallel.same(serial), "the number of threads changes the bits");
  cuda::prox_step(problem.args(device.phi), rule(device), nullptr);
  check(device, "cuda");
}

template <typename T>
void test_descent(const Problem<T>& problem, bool momentum, bool nesterov) {
  const T lr = T(0.1), mu = T(0.9);
  test_step(
      problem, "prox_gd",
      [&](State<T>& s) {
        return Descent<T>{momentum ? s.first.data() : nullptr, lr, mu, nesterov};
      },
      [&](double g, double velocity, double second) {
        if (!momentum) return Move{double(lr) * g, velocity, second};
        velocity = double(mu) * velocity + g;
        return Move{double(lr) * (nesterov ? g + double(mu) * velocity : velocity), velocity,
                    second};
      });
}

template <typename T>
void test_adam(const Problem<T>& problem) {
  const AdamSettings s{/*lr=*/0.05, /*beta1=*/0.9, /*beta2=*/0.99, /*eps=*/0.1, /*step=*/3};
  test_step(
      problem, "prox_adam",
      [&](State<T>& state) { return Adam<T>(state.first.data(), state.second.data(), s); },
      [&](double g, double m, double v) {
        m = s.beta1 * m + (1 - s.beta1) * g;
        v = s.beta2 * v + (1 - s.beta2) * g * g;
        const double mean = m / (1 - s.beta1 * s.beta1 * s.beta1);
        const double square = v / (1 - s.beta2 * s.beta2 * s.beta2);
        return Move{s.lr * mean / (std::sqrt(square) + s.eps), m, v};
      });
}

template <typename T>
void test_sums(const Problem<T>& problem) {
  const int64_t rows = problem.rows, dim = problem.dim;
  const std::vector<T>&phi = problem.phi, &grad = problem.grad;
  const ProxArgs<T> args = problem.args(phi);
  context = name_of<T>("sums", rows, dim);
  std::vector<double> norms(at(2 * rows), -1), norms_parallel = norms, norms_cuda = norms;
  std::vector<double> dots(at(rows), -1), dots_parallel = dots, dots_cuda = dots;
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
        const int64_t j = row * dim + i;
        const long double g = problem.gradient(j), away = problem.away(j);
        const long double product = static_cast<long double>(phi[at(j)]) * grad[at(j)];
        norm2 += g * g;
        penalty += problem.lam_at(j) * away * away;
        penalty_size += std::abs(problem.lam_at(j) * away * away);
        dot += product;
        size += std::abs(product);
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

template <typename T>
void test_all(int64_t rows, int64_t dim, bool diagonal) {
  const Problem<T> problem(rows, dim, diagonal);
  test_descent(problem, /*momentum=*/dim % 2 == 1, /*nesterov=*/diagonal);
  test_adam(problem);
  test_sums(problem);
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
