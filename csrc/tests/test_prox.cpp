// prox_gd and the row sums.
#include "harness.h"
#include "kernels/prox_gd.cuh"
#include "kernels/row_sums.cuh"

namespace imaml {
namespace {

template <typename T>
void test_rows(int64_t rows, int64_t dim, bool diagonal, bool momentum) {
  context =
      name_of<T>("prox", rows, dim) + (diagonal ? " diagonal" : "") + (momentum ? " momentum" : "");
  const unsigned seed = static_cast<unsigned>(rows * 7919 + dim);
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

template <typename T>
void test_type() {
  for (int64_t dim : kDims)
    for (int64_t rows : {0, 1, 8})
      for (bool diagonal : {false, true})
        test_rows<T>(rows, dim, diagonal && dim > 1, /*momentum=*/dim % 2 == 1);
  test_rows<T>(1, kManyBlocks, false, false);
}

}  // namespace

void test_prox() {
  test_type<float>();
  test_type<double>();
}

}  // namespace imaml
