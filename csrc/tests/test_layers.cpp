// The layers with weights for each task, against their formulas summed one by one in float64.
#include "harness.h"
#include "kernels/batch_norm.h"
#include "kernels/conv.h"

namespace imaml {
namespace {

using cpu::ConvShape;
using cpu::NormShape;

// ---- convolution -----------------------------------------------------------------------------

std::string describe(const ConvShape& s, const char* type) {
  char text[200];
  std::snprintf(text, sizeof text,
                "conv<%s> %dx%d images %dx%dx%d, %d filters %dx%d, stride %dx%d, pad %dx%d", type,
                int(s.tasks), int(s.images), int(s.in_h), int(s.in_w), int(s.channels),
                int(s.filters), int(s.kernel_h), int(s.kernel_w), int(s.stride_h), int(s.stride_w),
                int(s.pad_h), int(s.pad_w));
  return text;
}

// Calls body(y, x, w) with the places of each product x w that y is a sum of.
template <typename Body>
void for_products(const ConvShape& s, const Body& body) {
  for (int64_t b = 0; b < s.tasks; ++b)
    for (int64_t n = 0; n < s.images; ++n)
      for (int64_t row = 0; row < s.out_h; ++row)
        for (int64_t column = 0; column < s.out_w; ++column)
          for (int64_t o = 0; o < s.filters; ++o)
            for (int64_t c = 0; c < s.channels; ++c)
              for (int64_t i = 0; i < s.kernel_h; ++i)
                for (int64_t j = 0; j < s.kernel_w; ++j) {
                  const int64_t h = row * s.stride_h + i - s.pad_h;
                  const int64_t w = column * s.stride_w + j - s.pad_w;
                  if (h < 0 || h >= s.in_h || w < 0 || w >= s.in_w) continue;
                  const int64_t image = b * s.images + n;
                  body(((image * s.out_h + row) * s.out_w + column) * s.filters + o,
                       ((image * s.in_h + h) * s.in_w + w) * s.channels + c,
                       (((b * s.filters + o) * s.channels + c) * s.kernel_h + i) * s.kernel_w + j);
                }
}

// An entry and the sum of the sizes of what was added up to it.
struct Sums {
  std::vector<double> value, size;
  explicit Sums(std::size_t count) : value(count), size(count) {}
  void add(int64_t i, double term) {
    value[at(i)] += term;
    size[at(i)] += std::abs(term);
  }
};

template <typename T>
void expect_sums(const std::vector<T>& got, const Sums& want, const char* what) {
  for (std::size_t i = 0; i < got.size(); ++i)
    expect_close<T>(double(got[i]), want.value[i], want.size[i], what);
}

template <typename T>
void test_conv(const ConvShape& s) {
  context = describe(s, sizeof(T) == 4 ? "float" : "double");
  const int64_t in = s.tasks * s.images * s.in_pixels() * s.channels;
  const int64_t out = s.tasks * s.images * s.out_pixels() * s.filters;
  const auto x = normal<T>(in, 1), w = normal<T>(s.tasks * s.weights(), 2);
  // The same weights as they lie in rows of parameters, with other values between the tasks.
  ConvShape rows = s;
  rows.task_weights = s.weights() + 5;
  std::vector<T> apart(at(s.tasks * rows.task_weights), T(NAN));
  for (int64_t b = 0; b < s.tasks; ++b)
    std::copy_n(w.data() + b * s.weights(), s.weights(), apart.data() + b * rows.task_weights);
  const auto g = normal<T>(out, 3), bias = normal<T>(s.tasks * s.filters, 4);
  Sums y(at(out)), dx(at(in)), dw(w.size());
  for_products(s, [&](int64_t to_y, int64_t to_x, int64_t to_w) {
    y.add(to_y, double(x[at(to_x)]) * double(w[at(to_w)]));
    dx.add(to_x, double(g[at(to_y)]) * double(w[at(to_w)]));
    dw.add(to_w, double(x[at(to_x)]) * double(g[at(to_y)]));
  });
  // NaN: every entry has to be written.
  const auto results = [&](int threads, const auto& parallel_for) {
    std::vector<std::vector<T>> all;
    for (const std::size_t size : {g.size(), g.size(), x.size(), w.size()})
      all.emplace_back(size, T(NAN));
    cpu::conv(s, x.data(), w.data(), static_cast<const T*>(nullptr), all[0].data(), threads,
              parallel_for);
    cpu::conv(rows, x.data(), apart.data(), bias.data(), all[1].data(), threads, parallel_for);
    cpu::conv_data_gradient(rows, g.data(), apart.data(), all[2].data(), threads, parallel_for);
    cpu::conv_weight_gradient(s, x.data(), g.data(), all[3].data(), threads, parallel_for);
    return all;
  };
  const auto serial = results(1, cpu::Serial{});
  expect_sums(serial[0], y, "y");
  expect_sums(serial[2], dx, "dx");
  expect_sums(serial[3], dw, "dw");
  const int64_t of_task = s.images * s.out_pixels() * s.filters;
  for (int64_t i = 0; i < out; ++i)
    y.add(i, double(bias[at(i / of_task * s.filters + i % s.filters)]));
  expect_sums(serial[1], y, "y with bias");
  const auto parallel = results(5, Threads{3});
  for (std::size_t k = 0; k < serial.size(); ++k)
    expect(same_bits(serial[k], parallel[k]), "threads change the bits");
}

ConvShape shape_of(int64_t tasks, int64_t images, int64_t in_h, int64_t in_w, int64_t channels,
                   int64_t filters, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                   int64_t stride_w, int64_t pad_h, int64_t pad_w) {
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
          .task_weights = filters * channels * kernel_h * kernel_w};
}

// ---- batch norm ------------------------------------------------------------------------------

// One channel of one task, as the header defines it, in long double.
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
  std::vector<long double> centred(const std::vector<long double>& u) const {  // P u
    std::vector<long double> result(u.size());
    for (std::size_t i = 0; i < u.size(); ++i) result[i] = u[i] - mean(u) - mean(h, u) * h[i];
    return result;
  }
};

template <typename T>
void test_norm(const NormShape& s, bool relu) {
  context = std::string(sizeof(T) == 4 ? "norm<float> " : "norm<double> ") +
            std::to_string(s.tasks) + " " + std::to_string(s.rows) + " " +
            std::to_string(s.channels) + (relu ? " relu" : "");
  const int64_t count = s.tasks * s.rows * s.channels, channels = s.tasks * s.channels;
  const auto x = normal<T>(count, 1), g = normal<T>(count, 2), a = normal<T>(count, 3);
  const auto gamma = normal<T>(channels, 4), beta = normal<T>(channels, 5);
  const auto b = normal<T>(channels, 6), c = normal<T>(channels, 7);
  const double eps = 0.1;
  const auto results = [&](int threads, const auto& parallel_for) {
    std::vector<std::vector<T>> all;
    for (int k = 0; k < 9; ++k)
      all.emplace_back(at(k == 0 || k == 3 || k == 6 || k == 7 ? count : channels), T(NAN));
    const T *mean = all[1].data(), *scale = all[2].data();
    cpu::batch_norm(cpu::NormForward<T>{.shape = s,
                                        .eps = eps,
                                        .x = x.data(),
                                        .gamma = gamma.data(),
                                        .beta = beta.data(),
                                        .y = all[0].data(),
                                        .mean = all[1].data(),
                                        .scale = all[2].data()},
                    threads, parallel_for);
    cpu::batch_norm(cpu::NormBackward<T>{.shape = s,
                                         .relu = relu,
                                         .g = g.data(),
                                         .x = x.data(),
                                         .gamma = gamma.data(),
                                         .beta = beta.data(),
                                         .mean = mean,
                                         .scale = scale,
                                         .dx = all[3].data(),
                                         .dgamma = all[4].data(),
                                         .dbeta = all[5].data()},
                    threads, parallel_for);
    cpu::batch_norm(cpu::NormDoubleBackward<T>{.shape = s,
                                               .relu = relu,
                                               .a = a.data(),
                                               .b = b.data(),
                                               .c = c.data(),
                                               .g = g.data(),
                                               .x = x.data(),
                                               .gamma = gamma.data(),
                                               .beta = beta.data(),
                                               .mean = mean,
                                               .scale = scale,
                                               .to_g = all[6].data(),
                                               .to_x = all[7].data(),
                                               .to_gamma = all[8].data()},
                    threads, parallel_for);
    return all;
  };
  const auto got = results(1, cpu::Serial{});
  for (int64_t task = 0; task < s.tasks; ++task)
    for (int64_t channel = 0; channel < s.channels; ++channel) {
      const std::size_t own = at(task * s.channels + channel);
      const auto place = [&](int64_t row) {
        return at((task * s.rows + row) * s.channels + channel);
      };
      Channel one{{}, {}, {}, 0, double(gamma[own]), double(beta[own])};
      std::vector<long double> values;
      for (int64_t row = 0; row < s.rows; ++row) values.push_back(double(x[place(row)]));
      const long double mean = one.mean(values);
      for (long double& value : values) value -= mean;
      one.s = std::sqrt(one.mean(values, values) + static_cast<long double>(eps));
      std::vector<bool> passes;
      for (int64_t row = 0; row < s.rows; ++row) {
        one.h.push_back(values[at(row)] / one.s);
        const long double y = one.gamma * one.h.back() + one.beta;
        passes.push_back(!relu || y > 0);
        one.g.push_back(passes.back() ? double(g[place(row)]) : 0.0);
        one.a.push_back(double(a[place(row)]));
        expect_close<T>(double(got[0][place(row)]), y, 8, "y");
      }
      const long double rows = static_cast<long double>(s.rows), slope = one.gamma / one.s;
      expect_close<T>(double(got[1][own]), mean, 4, "mean");
      expect_close<T>(double(got[2][own]), 1 / one.s, 4, "scale");
      const auto pa = one.centred(one.a), pg = one.centred(one.g);
      const long double apg = one.mean(one.a, pg);
      for (int64_t row = 0; row < s.rows; ++row) {
        const std::size_t i = at(row);
        expect_close<T>(double(got[3][place(row)]), slope * pg[i], 64, "dx");
        const long double to_g = slope * pa[i] + double(b[own]) * one.h[i] + double(c[own]);
        expect_close<T>(double(got[6][place(row)]), passes[i] ? to_g : 0.0L, 64, "dS/dg");
        const long double to_x = (double(b[own]) - slope * one.mean(one.h, one.a)) * pg[i] -
                                 slope * one.mean(one.h, one.g) * pa[i] - slope * apg * one.h[i];
        expect_close<T>(double(got[7][place(row)]), to_x / one.s, 64, "dS/dx");
      }
      expect_close<T>(double(got[4][own]), rows * one.mean(one.h, one.g), 8 * rows, "dgamma");
      expect_close<T>(double(got[5][own]), rows * one.mean(one.g), 8 * rows, "dbeta");
      expect_close<T>(double(got[8][own]), rows / one.s * apg, 8 * rows, "dS/dgamma");
    }
  const auto parallel = results(5, Threads{3});
  for (std::size_t k = 0; k < got.size(); ++k)
    expect(same_bits(got[k], parallel[k]), "threads change the bits");
}

}  // namespace

void test_layers() {
  // Around a tile's lanes (8 doubles, 16 floats) and rows (6), and with fewer channels than rows.
  for (const int64_t channels : {1, 3, 6, 7, 17})
    for (const int64_t filters : {1, 8, 15, 33}) {
      test_conv<float>(shape_of(2, 3, 5, 4, channels, filters, 3, 3, 2, 2, 1, 1));
      test_conv<double>(shape_of(2, 3, 5, 4, channels, filters, 3, 3, 2, 2, 1, 1));
    }
  // Every remainder of the pixels by a tile's rows.
  for (int64_t images = 1; images <= 7; ++images)
    test_conv<float>(shape_of(1, images, 3, 3, 4, 4, 3, 3, 1, 1, 1, 1));
  // More pixels than the weight gradient takes at a time, in one image and in many.
  test_conv<float>(shape_of(1, 2, 12, 11, 6, 5, 3, 3, 1, 1, 1, 1));
  test_conv<float>(shape_of(1, 60, 4, 4, 2, 5, 3, 3, 2, 2, 1, 1));
  // Even and uneven kernels, pointwise ones, strides beyond the kernel and beyond the image,
  // padding beyond the kernel, a kernel that is as large as the image.
  for (const auto& s :
       {shape_of(3, 2, 6, 5, 3, 4, 2, 3, 1, 2, 0, 1), shape_of(2, 2, 7, 7, 3, 4, 1, 1, 1, 1, 0, 0),
        shape_of(2, 2, 7, 5, 3, 4, 1, 2, 3, 3, 0, 0), shape_of(1, 2, 3, 3, 7, 4, 2, 2, 5, 4, 1, 0),
        shape_of(1, 2, 2, 3, 2, 4, 2, 2, 2, 1, 3, 2),
        shape_of(2, 3, 4, 4, 5, 9, 4, 4, 1, 1, 0, 0)}) {
    test_conv<float>(s);
    test_conv<double>(s);
  }
  for (const bool relu : {false, true})
    for (const int64_t channels : {1, 15, 16, 17, 40})
      for (const int64_t rows : {2, 5, 64, 65, 130}) {
        test_norm<float>({.tasks = 3, .rows = rows, .channels = channels}, relu);
        test_norm<double>({.tasks = 3, .rows = rows, .channels = channels}, relu);
      }
}

}  // namespace imaml
