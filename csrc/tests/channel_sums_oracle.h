// channel_sums, compared with sums in long double.
#pragma once
#include "cpu/channel_sums.h"
#include "cuda/channel_sums.cuh"
#include "operands.h"

namespace imaml {

template <typename T>
struct ChannelProblem {
  NormShape shape;
  std::vector<T> g;  // [tasks, rows, channels]

  ChannelProblem(const NormShape& s, std::uint64_t seed)
      : shape(s), g(normal<T>(s.tasks * s.rows * s.channels, seed)) {}
};

template <typename T>
struct ChannelSums {
  std::vector<T> sums;
  bool same(const ChannelSums& o) const { return same_bits(sums, o.sums); }
};

// `sum` is called as sum(shape, g, out), on results initialised to NaN.
template <typename T, typename Sum>
ChannelSums<T> channel_sums_by(const ChannelProblem<T>& problem, std::size_t offset,
                               const Sum& sum) {
  ChannelSums<T> got{std::vector<T>(at(problem.shape.tasks * problem.shape.channels), T(NAN))};
  Operands operands(offset);
  sum(problem.shape, operands.in(problem.g), operands.out(got.sums));
  operands.copy_back();
  return got;
}

template <typename T, typename ParallelFor = cpu::Serial>
ChannelSums<T> run_channel_sums(const ChannelProblem<T>& problem,
                                const ParallelFor& parallel_for = {}, std::size_t offset = 0) {
  return channel_sums_by(problem, offset, [&](const NormShape& s, const T* g, T* out) {
    cpu::channel_sums(s, g, out, parallel_for);
  });
}

template <typename T>
ChannelSums<T> run_channel_sums_on_cuda(const ChannelProblem<T>& problem, std::size_t offset = 0) {
  return channel_sums_by(problem, offset, [](const NormShape& s, const T* g, T* out) {
    cuda::channel_sums(s, g, out, nullptr);
  });
}

template <typename T>
void check_channel_sums(const ChannelProblem<T>& problem, const ChannelSums<T>& got) {
  const NormShape& s = problem.shape;
  for (int64_t task = 0; task < s.tasks; ++task)
    for (int64_t channel = 0; channel < s.channels; ++channel) {
      long double sum = 0, size = 0;
      for (int64_t row = 0; row < s.rows; ++row) {
        const long double one = problem.g[at((task * s.rows + row) * s.channels + channel)];
        sum += one;
        size += std::isfinite(one) ? std::abs(one) : 0;
      }
      if (sizeof(T) == sizeof(double)) size *= s.rows;  // every addition is rounded to T
      expect_close<T>(got.sums[at(task * s.channels + channel)], sum, size, "a channel's sum");
    }
}

}  // namespace imaml
