// Batch norm and its derivatives, compared with their formulas in long double.
#pragma once
#include "cpu/batch_norm.h"
#include "cuda/batch_norm.cuh"
#include "operands.h"

namespace imaml {

template <typename T>
struct NormProblem {
  NormShape shape;
  bool relu;
  double eps = 0.1;
  int64_t gap = 0;  // other values between the gamma, beta, b and c of two tasks
  std::vector<T> x, g, a, gamma, beta, b, c;

  NormProblem(const NormShape& s, bool relu, std::uint64_t seed) : shape(s), relu(relu) {
    const int64_t count = s.tasks * s.rows * s.channels, channels = s.tasks * s.channels;
    x = normal<T>(count, seed + 1);
    g = normal<T>(count, seed + 2);
    a = normal<T>(count, seed + 3);
    gamma = normal<T>(channels, seed + 4);
    beta = normal<T>(channels, seed + 5);
    b = normal<T>(channels, seed + 6);
    c = normal<T>(channels, seed + 7);
  }

  // The index in tensors like x, and in those with one entry per channel.
  std::size_t index(int64_t task, int64_t row, int64_t channel) const {
    return at((task * shape.rows + row) * shape.channels + channel);
  }
  std::size_t index(int64_t task, int64_t channel) const {
    return at(task * shape.channels + channel);
  }

  std::vector<T> with_gaps(const std::vector<T>& channels) const {
    std::vector<T> result;
    for (int64_t task = 0; task < shape.tasks; ++task) {
      if (task > 0) result.insert(result.end(), at(gap), T(NAN));
      const auto first = channels.begin() + task * shape.channels;
      result.insert(result.end(), first, first + shape.channels);
    }
    return result;
  }
};

template <typename T>
struct NormResults {
  std::vector<T> y, positive, mean, scale, dx, dgamma, dbeta, grad_g, grad_x, grad_gamma;

  // NaN, to detect entries that are not written.
  explicit NormResults(const NormProblem<T>& problem) {
    for (auto* images : {&y, &positive, &dx, &grad_g, &grad_x})
      images->assign(problem.x.size(), T(NAN));
    for (auto* channels : {&mean, &scale, &dgamma, &dbeta, &grad_gamma})
      channels->assign(problem.gamma.size(), T(NAN));
  }
  bool same(const NormResults& o) const {
    return same_bits(y, o.y) && same_bits(positive, o.positive) && same_bits(mean, o.mean) &&
           same_bits(scale, o.scale) && same_bits(dx, o.dx) && same_bits(dgamma, o.dgamma) &&
           same_bits(dbeta, o.dbeta) && same_bits(grad_g, o.grad_g) &&
           same_bits(grad_x, o.grad_x) && same_bits(grad_gamma, o.grad_gamma);
  }
};

// Runs the three passes with run(pass).
template <typename T, typename Run>
NormResults<T> run_norm_by(const NormProblem<T>& problem, const Run& run, std::size_t offset) {
  NormResults<T> got(problem);
  const std::vector<T> gamma = problem.with_gaps(problem.gamma),
                       beta = problem.with_gaps(problem.beta);
  const std::vector<T> b = problem.with_gaps(problem.b), c = problem.with_gaps(problem.c);
  Operands operands(offset);
  NormForward<T> forward{.shape = problem.shape,
                         .eps = problem.eps,
                         .x = operands.in(problem.x),
                         .gamma = {operands.in(gamma), problem.gap},
                         .beta = {operands.in(beta), problem.gap},
                         .y = operands.out(got.y),
                         .positive = problem.relu ? operands.out(got.positive) : nullptr,
                         .mean = operands.out(got.mean),
                         .scale = operands.out(got.scale)};
  run(forward);
  const NormOperands<T> shared{.shape = problem.shape,
                               .relu = problem.relu,
                               .g = operands.in(problem.g),
                               .x = forward.x,
                               .gamma = forward.gamma,
                               .beta = forward.beta,
                               .mean = forward.mean,
                               .scale = forward.scale};
  run(NormBackward<T>{shared, operands.out(got.dx), operands.out(got.dgamma),
                      operands.out(got.dbeta)});
  run(NormDoubleBackward<T>{shared,
                            operands.in(problem.a),
                            {operands.in(b), problem.gap},
                            {operands.in(c), problem.gap},
                            operands.out(got.grad_g),
                            operands.out(got.grad_x),
                            operands.out(got.grad_gamma)});
  operands.copy_back();
  return got;
}

template <typename T, typename ParallelFor = cpu::Serial>
NormResults<T> run_norm(const NormProblem<T>& problem, int threads = 1,
                        const ParallelFor& parallel_for = {}, std::size_t offset = 0) {
  return run_norm_by(
      problem, [&](const auto& pass) { cpu::batch_norm(pass, threads, parallel_for); }, offset);
}

// On the device that shim::device describes.
template <typename T>
NormResults<T> run_norm_on_cuda(const NormProblem<T>& problem, std::size_t offset = 0) {
  return run_norm_by(problem, [](const auto& pass) { cuda::batch_norm(pass, nullptr); }, offset);
}

// One channel of one task, with the notation of norm_formulas.h.
struct Channel {
  std::vector<long double> h, g, a;
  long double s, gamma, beta;

  long double mean(const std::vector<long double>& u) const {
    long double total = 0;
    for (const long double value : u) total += value;
    return total / static_cast<long double>(u.size());
  }
  long double mean(const std::vector<long double>& u, const std::vector<long double>& v) const {
    std::vector<long double> products(u.size());
    for (std::size_t i = 0; i < u.size(); ++i) products[i] = u[i] * v[i];
    return mean(products);
  }
  std::vector<long double> projected(const std::vector<long double>& u) const {  // P u
    const long double mean_u = mean(u), mean_hu = mean(h, u);
    std::vector<long double> result(u.size());
    for (std::size_t i = 0; i < u.size(); ++i) result[i] = u[i] - mean_u - mean_hu * h[i];
    return result;
  }
};

// Checks one channel of one task. Derivatives are not checked if rounding decides about the sign of
// some y before relu.
template <typename T>
void check_norm(const NormProblem<T>& problem, const NormResults<T>& got, int64_t task,
                int64_t channel) {
  const NormShape& s = problem.shape;
  const std::size_t at_channel = problem.index(task, channel);
  const auto index = [&](int64_t row) { return problem.index(task, row, channel); };
  Channel one{{}, {}, {}, 0, double(problem.gamma[at_channel]), double(problem.beta[at_channel])};
  std::vector<long double> values;
  for (int64_t row = 0; row < s.rows; ++row) values.push_back(double(problem.x[index(row)]));
  const long double mean = one.mean(values);
  for (long double& value : values) value -= mean;
  one.s = std::sqrt(one.mean(values, values) + static_cast<long double>(problem.eps));
  std::vector<bool> positive;
  bool decided = true;
  for (int64_t row = 0; row < s.rows; ++row) {
    one.h.push_back(values[at(row)] / one.s);
    const long double y = one.gamma * one.h.back() + one.beta;
    decided = decided && (!problem.relu || std::abs(y) > 8 * kTolerance<T>);
    positive.push_back(!problem.relu || y > 0);
    one.g.push_back(positive.back() ? double(problem.g[index(row)]) : 0.0);
    one.a.push_back(double(problem.a[index(row)]));
    expect_close<T>(double(got.y[index(row)]), y, 8, "y");
    if (problem.relu)
      expect_close<T>(double(got.positive[index(row)]), y > 0 ? y : 0.0L, 8, "max(y, 0)");
  }
  const long double rows = static_cast<long double>(s.rows), factor = one.gamma / one.s;
  const long double b = double(problem.b[at_channel]), c = double(problem.c[at_channel]);
  expect_close<T>(double(got.mean[at_channel]), mean, 4, "mean");
  expect_close<T>(double(got.scale[at_channel]), 1 / one.s, 4, "scale");
  if (!decided) return;
  const auto pa = one.projected(one.a), pg = one.projected(one.g);
  const long double apg = one.mean(one.a, pg);
  for (int64_t row = 0; row < s.rows; ++row) {
    const std::size_t i = at(row);
    expect_close<T>(double(got.dx[index(row)]), factor * pg[i], 64, "dx");
    const long double grad_g = factor * pa[i] + b * one.h[i] + c;
    expect_close<T>(double(got.grad_g[index(row)]), positive[i] ? grad_g : 0.0L, 64, "dS/dg");
    const long double grad_x = (b - factor * one.mean(one.h, one.a)) * pg[i] -
                               factor * one.mean(one.h, one.g) * pa[i] - factor * apg * one.h[i];
    expect_close<T>(double(got.grad_x[index(row)]), grad_x / one.s, 64, "dS/dx");
  }
  expect_close<T>(double(got.dgamma[at_channel]), rows * one.mean(one.h, one.g), 8 * rows,
                  "dgamma");
  expect_close<T>(double(got.dbeta[at_channel]), rows * one.mean(one.g), 8 * rows, "dbeta");
  expect_close<T>(double(got.grad_gamma[at_channel]), rows / one.s * apg, 8 * rows, "dS/dgamma");
}

}  // namespace imaml
