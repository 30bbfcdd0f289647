// Convolutions with one set of weights per task, compared with sums of products in float64.
#pragma once
#include <algorithm>
#include <limits>

#include "cpu/conv.h"
#include "operands.h"

namespace imaml {

inline ConvShape shape_of(int64_t tasks, int64_t images, int64_t in_h, int64_t in_w,
                          int64_t channels, int64_t filters, int64_t kernel_h, int64_t kernel_w,
                          int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  return {.tasks = tasks,
          .images = images,
          .in_h = in_h,
          .in_w = in_w,
          .channels = channels,
          .out_h = (in_h + 2 * pad_h - kernel_h) / stride_h + 1,
          .out_w = (in_w + 2 * pad_w - kernel_w) / stride_w + 1,
          .filters = filters,
          .kernel_h = kernel_h,
          .kernel_w = kernel_w,
          .stride_h = stride_h,
          .stride_w = stride_w,
          .pad_h = pad_h,
          .pad_w = pad_w,
          .task_stride = filters * channels * kernel_h * kernel_w};
}

inline std::string describe(const ConvShape& s, const char* type) {
  char text[200];
  std::snprintf(text, sizeof text,
                "conv<%s> %dx%d images %dx%dx%d, %d filters %dx%d, stride %dx%d, pad %dx%d", type,
                int(s.tasks), int(s.images), int(s.in_h), int(s.in_w), int(s.channels),
                int(s.filters), int(s.kernel_h), int(s.kernel_w), int(s.stride_h), int(s.stride_w),
                int(s.pad_h), int(s.pad_w));
  return text;
}

template <typename T>
struct ConvProblem {
  ConvShape shape;
  std::vector<T> x, w, bias, g;

  // The weights of a task, and their gradient, are contiguous, with `gap` other values between
  // tasks, as in rows of parameters.
  ConvProblem(const ConvShape& s, int64_t gap, std::uint64_t seed) : shape(s) {
    shape.task_stride = s.weights() + gap;
    x = normal<T>(s.tasks * images(), seed);
    g = normal<T>(s.tasks * outputs(), seed + 1);
    bias = normal<T>(s.tasks * s.filters, seed + 2);
    const std::vector<T> weights = normal<T>(s.tasks * s.weights(), seed + 3);
    w.assign(at((s.tasks - 1) * shape.task_stride + s.weights()), T(NAN));
    for (int64_t task = 0; task < s.tasks; ++task)
      std::copy_n(weights.data() + task * s.weights(), s.weights(),
                  w.data() + task * shape.task_stride);
  }

  // Elements of a task in tensors like x and like y.
  int64_t images() const { return shape.images * shape.in_pixels() * shape.channels; }
  int64_t outputs() const { return shape.images * shape.out_pixels() * shape.filters; }
};

template <typename T>
struct ConvResults {
  std::vector<T> y, dx;
  std::vector<T> dw;  // with the gaps of w
  bool same(const ConvResults& o) const {
    return same_bits(y, o.y) && same_bits(dx, o.dx) && same_bits(dw, o.dw);
  }
};

template <typename T, typename ParallelFor = cpu::Serial>
ConvResults<T> run_conv(const ConvProblem<T>& problem, bool biased, int threads = 1,
                        const ParallelFor& parallel_for = {}, std::size_t offset = 0) {
  const ConvShape& s = problem.shape;
  // NaN, to detect entries that are not written.
  ConvResults<T> got{std::vector<T>(problem.g.size(), T(NAN)),
                     std::vector<T>(problem.x.size(), T(NAN)),
                     std::vector<T>(problem.w.size(), T(NAN))};
  Operands operands(offset);
  const T *x = operands.in(problem.x), *w = operands.in(problem.w), *g = operands.in(problem.g);
  cpu::conv<T>(s, x, w, biased ? operands.in(problem.bias) : nullptr, operands.out(got.y), threads,
               parallel_for);
  cpu::conv_data_gradient<T>(s, g, w, operands.out(got.dx), threads, parallel_for);
  cpu::conv_weight_gradient<T>(s, x, g, operands.out(got.dw), threads, parallel_for);
  operands.copy_back();
  for (int64_t task = 0; task + 1 < s.tasks; ++task)
    for (int64_t i = task * s.task_stride + s.weights(); i < (task + 1) * s.task_stride; ++i)
      expect(std::isnan(got.dw[at(i)]), "dw is written between two tasks");
  return got;
}

// Calls body(y, x, tap) for each product x w in the convolution of `task`, with the indices of y
// and x, and the index of w among the task's weights.
template <typename Body>
void for_products(const ConvShape& s, int64_t task, const Body& body) {
  for (int64_t image = task * s.images; image < (task + 1) * s.images; ++image)
    for (int64_t row = 0; row < s.out_h; ++row)
      for (int64_t column = 0; column < s.out_w; ++column)
        for (int64_t o = 0; o < s.filters; ++o)
          for (int64_t c = 0; c < s.channels; ++c)
            for (int64_t i = 0; i < s.kernel_h; ++i)
              for (int64_t j = 0; j < s.kernel_w; ++j) {
                const int64_t h = row * s.stride_h + i - s.pad_h;
                const int64_t w = column * s.stride_w + j - s.pad_w;
                if (h < 0 || h >= s.in_h || w < 0 || w >= s.in_w) continue;
                body(((image * s.out_h + row) * s.out_w + column) * s.filters + o,
                     ((image * s.in_h + h) * s.in_w + w) * s.channels + c,
                     ((o * s.channels + c) * s.kernel_h + i) * s.kernel_w + j);
              }
}

// Sums with indices from `first` on: value, sum of magnitudes, and number of terms.
struct Sums {
  int64_t first;
  std::vector<double> value, size, terms;
  Sums(int64_t first, int64_t count)
      : first(first), value(at(count)), size(at(count)), terms(at(count)) {}
  void add(int64_t i, double term) {
    value[at(i - first)] += term;
    size[at(i - first)] += std::abs(term);
    terms[at(i - first)] += 1;
  }
};

// A sum is finite only if all its terms are. A value outside a sum, next to the image's border or
// past the last channel, must not reach it.
template <typename T>
void expect_sums(const std::vector<T>& got, const Sums& want, const char* what) {
  for (std::size_t i = 0; i < want.value.size(); ++i) {
    const double value = double(got[at(want.first) + i]);
    if (!std::isfinite(want.value[i])) {
      expect(!std::isfinite(value), what);
    } else {
      // The rounding errors of n equal terms do not cancel: n / 2 eps in total.
      const double roundings = want.terms[i] * double(std::numeric_limits<T>::epsilon()) / 2;
      expect_close<T>(value, want.value[i], want.size[i] * std::max(1.0, roundings / kTolerance<T>),
                      what);
    }
  }
}

template <typename T>
void check_conv(const ConvProblem<T>& problem, bool biased, const ConvResults<T>& got,
                int64_t task) {
  const ConvShape& s = problem.shape;
  Sums y(task * problem.outputs(), problem.outputs()),
      dx(task * problem.images(), problem.images());
  Sums dw(task * s.task_stride, s.weights());
  for_products(s, task, [&](int64_t to_y, int64_t to_x, int64_t tap) {
    const double x = double(problem.x[at(to_x)]), g = double(problem.g[at(to_y)]);
    const double w = double(problem.w[at(task * s.task_stride + tap)]);
    y.add(to_y, x * w);
    dx.add(to_x, g * w);
    dw.add(dw.first + tap, x * g);
  });
  if (biased)
    for (int64_t i = 0; i < problem.outputs(); ++i)
      y.add(y.first + i, double(problem.bias[at(task * s.filters + i % s.filters)]));
  expect_sums(got.y, y, "y");
  expect_sums(got.dx, dx, "dx");
  expect_sums(got.dw, dw, "dw");
}

}  // namespace imaml
