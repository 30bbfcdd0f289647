// Convolutions, patches, products and batch norms of random shapes on arbitrary values.
#include "channel_sums_oracle.h"
#include "conv_oracle.h"
#include "fuzz.h"
#include "norm_oracle.h"
#include "patches_oracle.h"
#include "product_oracle.h"

namespace imaml {
namespace {

ConvShape drawn_shape(Draw& draw) {
  for (;;) {
    const bool large = draw.chance(0.1);
    const int64_t side = large ? 16 : 7;
    const int64_t in_h = draw.from(1, side), in_w = draw.from(1, side);
    const int64_t pad_h = draw.from(0, 3), pad_w = draw.from(0, 3);
    const int64_t kernel_h = draw.from(1, 4), kernel_w = draw.from(1, 4);
    if (kernel_h > in_h + 2 * pad_h || kernel_w > in_w + 2 * pad_w) continue;
    const ConvShape s =
        shape_of(draw.from(1, 6), draw.from(1, large ? 30 : 4), in_h, in_w,
                 draw.chance(0.2) ? draw.from(60, 70) : draw.from(1, 20), draw.from(1, 36),
                 kernel_h, kernel_w, draw.from(1, 5), draw.from(1, 5), pad_h, pad_w);
    if (s.tasks * s.images * s.out_pixels() * s.weights() <= 300000) return s;
  }
}

// One task of a tensor like w.
template <typename T>
std::vector<T> weights_of(const ConvProblem<T>& problem, const std::vector<T>& w, int64_t task) {
  const auto first = w.begin() + task * problem.shape.task_stride;
  return std::vector<T>(first, first + problem.shape.weights());
}

template <typename T>
ConvProblem<T> only(const ConvProblem<T>& problem, int64_t task) {
  ConvProblem<T> one = problem;
  one.shape.tasks = 1;
  one.x = part(problem.x, task, problem.images());
  one.g = part(problem.g, task, problem.outputs());
  one.bias = part(problem.bias, task, problem.shape.filters);
  one.w = weights_of(problem, problem.w, task);
  return one;
}

template <typename T>
NormProblem<T> only(const NormProblem<T>& problem, int64_t task) {
  NormProblem<T> one = problem;
  one.shape.tasks = 1;
  using Tensor = std::vector<T> NormProblem<T>::*;
  for (Tensor images : {&NormProblem<T>::x, &NormProblem<T>::g, &NormProblem<T>::a})
    one.*images = part(problem.*images, task, problem.shape.rows * problem.shape.channels);
  for (Tensor channels :
       {&NormProblem<T>::gamma, &NormProblem<T>::beta, &NormProblem<T>::b, &NormProblem<T>::c})
    one.*channels = part(problem.*channels, task, problem.shape.channels);
  return one;
}

template <typename T>
NormResults<T> only(const NormProblem<T>& problem, const NormResults<T>& all, int64_t task) {
  NormResults<T> one = all;
  using Tensor = std::vector<T> NormResults<T>::*;
  for (Tensor images : {&NormResults<T>::y, &NormResults<T>::positive, &NormResults<T>::dx,
                        &NormResults<T>::grad_g, &NormResults<T>::grad_x})
    one.*images = part(all.*images, task, problem.shape.rows * problem.shape.channels);
  for (Tensor channels : {&NormResults<T>::mean, &NormResults<T>::scale, &NormResults<T>::dgamma,
                          &NormResults<T>::dbeta, &NormResults<T>::grad_gamma})
    one.*channels = part(all.*channels, task, problem.shape.channels);
  return one;
}

// Whether all values of a channel are as small as normal random numbers.
template <typename T>
bool is_moderate(const NormProblem<T>& problem, int64_t task, int64_t channel) {
  const std::size_t at_channel = problem.index(task, channel);
  bool moderate = true;
  const auto add = [&](T value) { moderate = moderate && std::abs(value) < T(6); };
  for (int64_t row = 0; row < problem.shape.rows; ++row)
    for (const auto* images : {&problem.x, &problem.g, &problem.a})
      add((*images)[problem.index(task, row, channel)]);
  for (const auto* channels : {&problem.gamma, &problem.beta, &problem.b, &problem.c})
    add((*channels)[at_channel]);
  return moderate;
}

template <typename T>
void check(const NormProblem<T>& problem, const NormResults<T>& got) {
  for (int64_t task = 0; task < problem.shape.tasks; ++task)
    for (int64_t channel = 0; channel < problem.shape.channels; ++channel) {
      if (is_moderate(problem, task, channel)) check_norm(problem, got, task, channel);
      Range x, g;
      for (int64_t row = 0; row < problem.shape.rows; ++row) {
        x &= problem.x[problem.index(task, row, channel)];
        g &= problem.g[problem.index(task, row, channel)];
      }
      if (!x.finite)
        for (const auto* statistics : {&got.mean, &got.scale})
          expect(!std::isfinite((*statistics)[problem.index(task, channel)]),
                 "x is not finite, but its mean or scale is");
      for (int64_t row = 0; row < problem.shape.rows; ++row) {
        const T y = got.y[problem.index(task, row, channel)];
        const T positive = got.positive[problem.index(task, row, channel)];
        if (problem.relu)
          expect(std::isnan(y) ? std::isnan(positive) : positive == std::max(y, T(0)), "max(y, 0)");
        if (!x.finite)
          expect(!std::isfinite(got.y[problem.index(task, row, channel)]),
                 "x is not finite, but y is");
        else if (!g.finite && !problem.relu)
          expect(!std::isfinite(got.dx[problem.index(task, row, channel)]),
                 "g is not finite, but dx is");
      }
    }
}

}  // namespace

constexpr shim::Order kOrders[] = {shim::Order::kForwards, shim::Order::kBackwards,
                                   shim::Order::kShuffled, shim::Order::kWarpByWarp,
                                   shim::Order::kLastWarpFirst};

template <typename T>
void fuzz_patches(Draw& draw) {
  PatchProblem<T> problem(drawn_shape(draw), draw.seed());
  const ConvShape& s = problem.shape;
  context = "patches of " + describe(problem.shape, sizeof(T) == 4 ? "float" : "double");
  const bool corrupted = draw.chance(0.5), emulated = kEmulates && draw.chance(0.3);
  for (int64_t image = 0; corrupted && image < s.tasks * s.images; ++image) {
    draw.corrupt(problem.images.data() + image * s.image_size(), s.image_size());
    draw.corrupt(problem.rows.data() + image * s.patches_size(), s.patches_size());
  }
  ++tried["patches and their transpose"];
  bool moderate = true;  // apart from values that are not finite
  for (const T value : problem.rows)
    moderate = moderate && (!std::isfinite(value) || std::abs(double(value)) <= kModerate<T>);

  const PatchResults<T> serial = run_patches(problem, cpu::Serial{}, draw.offset());
  if (moderate) check_patches(problem, serial);
  on_threads(draw, [&](int, const Threads& pool) {
    return run_patches(problem, pool, draw.offset()).same(serial);
  });
  if (!emulated) return;
  ++tried["patches and their transpose, emulated CUDA"];
  shim::order = draw.one_of(kOrders);
  const PatchResults<T> device = run_patches_on_cuda(problem, draw.offset());
  expect(same_bits(device.rows, serial.rows), "patches differ on emulated CUDA");
  if (moderate) check_patches(problem, device);
}

template <typename T>
void fuzz_channel_sums(Draw& draw) {
  const NormShape s{.tasks = draw.from(1, 5),
                    .rows = draw.from(1, draw.chance(0.2) ? 600 : 20),
                    .channels = draw.chance(0.5) ? 4 * draw.from(1, 17) : draw.from(1, 70)};
  ChannelProblem<T> problem(s, draw.seed());
  const int64_t size = s.rows * s.channels;
  context = std::string(sizeof(T) == 4 ? "channel_sums<float> " : "channel_sums<double> ") +
            std::to_string(s.rows) + " " + std::to_string(s.channels);
  const bool corrupted = draw.chance(0.5), emulated = kEmulates && draw.chance(0.3);
  for (int64_t task = 0; corrupted && task < s.tasks; ++task)
    draw.corrupt(problem.g.data() + task * size, size);
  ++tried["channel_sums"];
  bool moderate = true;  // apart from values that are not finite
  for (const T value : problem.g)
    moderate = moderate && (!std::isfinite(value) || std::abs(double(value)) <= kModerate<T>);
  const int64_t task = draw.from(0, s.tasks - 1);
  ChannelProblem<T> alone = problem;
  alone.shape.tasks = 1;
  alone.g = part(problem.g, task, size);
  const auto of_task = [&](const ChannelSums<T>& all) {
    return ChannelSums<T>{part(all.sums, task, s.channels)};
  };

  const ChannelSums<T> serial = run_channel_sums(problem, cpu::Serial{}, draw.offset());
  if (moderate) check_channel_sums(problem, serial);
  on_threads(draw, [&](int, const Threads& pool) {
    return run_channel_sums(problem, pool, draw.offset()).same(serial);
  });
  expect(run_channel_sums(alone).same(of_task(serial)), "a task changes another's bits");
  if (!emulated) return;
  ++tried["channel_sums, emulated CUDA"];
  shim::device = draw.chance(0.7) ? shim::Device{{132, 66, 33, 16, 0}, {48000, 48000, 48000, 48000}}
                                  : shim::Device{{108}, {48000}};
  shim::order = draw.one_of(kOrders);
  const ChannelSums<T> device = run_channel_sums_on_cuda(problem, draw.offset());
  if (moderate) check_channel_sums(problem, device);
  shim::order = draw.one_of(kOrders);
  expect(run_channel_sums_on_cuda(problem).same(device),
         "the order of threads or the alignment changes the bits");
  expect(run_channel_sums_on_cuda(alone, draw.offset()).same(of_task(device)),
         "a task changes another's bits");
}

template <typename T>
void fuzz_conv(Draw& draw) {
  const ConvShape s = drawn_shape(draw);
  const bool biased = draw.chance(0.5);
  ConvProblem<T> problem(s, /*gap=*/draw.chance(0.5) ? draw.from(0, 40) : 0, draw.seed());
  context = describe(s, sizeof(T) == 4 ? "float" : "double");
  const bool corrupted = draw.chance(0.5);
  for (int64_t task = 0; corrupted && task < s.tasks; ++task) {
    draw.corrupt(problem.x.data() + task * problem.images(), problem.images());
    draw.corrupt(problem.g.data() + task * problem.outputs(), problem.outputs());
    draw.corrupt(problem.w.data() + task * problem.shape.task_stride, s.weights());
    draw.corrupt(problem.bias.data() + task * s.filters, s.filters);
  }
  ++tried[biased ? "conv with bias, and both gradients" : "conv, and both gradients"];

  const ConvResults<T> serial = run_conv(problem, biased, 1, cpu::Serial{}, draw.offset());
  for (int64_t task = 0; task < s.tasks; ++task) {
    const ConvProblem<T> own = only(problem, task);
    bool moderate = true;  // apart from values that are not finite
    for (const auto* values : {&own.x, &own.w, &own.bias, &own.g})
      for (const T value : *values)
        moderate = moderate && (!std::isfinite(value) || std::abs(double(value)) <= kModerate<T>);
    if (moderate) check_conv(problem, biased, serial, task);
  }
  on_threads(draw, [&](int threads, const Threads& pool) {
    return run_conv(problem, biased, threads, pool, draw.offset()).same(serial);
  });
  const int64_t task = draw.from(0, s.tasks - 1);
  const ConvResults<T> want{part(serial.y, task, problem.outputs()),
                            part(serial.dx, task, problem.images()),
                            weights_of(problem, serial.dw, task)};
  expect(run_conv(only(problem, task), biased).same(want), "a task changes another's bits");
}

template <typename T>
void fuzz_batch_norm(Draw& draw) {
  const NormShape s{.tasks = draw.from(1, 6),
                    .rows = draw.from(1, draw.chance(0.2) ? 200 : 20),
                    .channels = draw.from(1, 40)};
  NormProblem<T> problem(s, /*relu=*/draw.chance(0.5), draw.seed());
  problem.gap = draw.chance(0.5) ? draw.from(0, 40) : 0;
  const bool corrupted = draw.chance(0.5);
  for (int64_t task = 0; corrupted && task < s.tasks; ++task) {
    for (auto* images : {&problem.x, &problem.g, &problem.a})
      draw.corrupt(images->data() + problem.index(task, 0, 0), s.rows * s.channels);
    for (auto* channels : {&problem.gamma, &problem.beta, &problem.b, &problem.c})
      draw.corrupt(channels->data() + problem.index(task, 0), s.channels);
  }
  context = std::string(sizeof(T) == 4 ? "norm<float> " : "norm<double> ") +
            std::to_string(s.tasks) + " " + std::to_string(s.rows) + " " +
            std::to_string(s.channels) + (problem.relu ? " relu" : "");
  ++tried[problem.relu ? "batch_norm and relu, and both derivatives"
                       : "batch_norm, and both derivatives"];

  const NormResults<T> serial = run_norm(problem, 1, cpu::Serial{}, draw.offset());
  check(problem, serial);
  on_threads(draw, [&](int threads, const Threads& pool) {
    return run_norm(problem, threads, pool, draw.offset()).same(serial);
  });
  const int64_t task = draw.from(0, s.tasks - 1);
  expect(run_norm(only(problem, task)).same(only(problem, serial, task)),
         "a task changes another's bits");

  if (!kEmulates || !draw.chance(0.2)) return;
  ++tried["batch_norm and both derivatives, emulated CUDA"];
  constexpr shim::Device kDevices[] = {{{132, 66, 33, 16, 0}, {48000, 48000, 48000, 48000, 0}},
                                       {{108}, {48000}}};
  shim::device = draw.one_of(kDevices);
  shim::order = draw.one_of(kOrders);
  context += " cuda, order " + std::to_string(static_cast<int>(shim::order));
  const NormResults<T> device = run_norm_on_cuda(problem, draw.offset());
  check(problem, device);
  shim::order = draw.one_of(kOrders);
  expect(run_norm_on_cuda(problem).same(device), "the order of threads changes the bits: a race");
  expect(run_norm_on_cuda(only(problem, task)).same(only(problem, device, task)),
         "a task changes another's bits");
}

template <typename T>
void fuzz_batched_product(Draw& draw) {
  const bool large = draw.chance(0.05);
  const int64_t rows = draw.from(1, large ? 300 : 70), columns = draw.from(1, large ? 300 : 70);
  const int64_t terms = draw.chance(0.5) ? draw.from(0, 80) : draw.from(81, 600);
  ProductProblem<T> problem(draw.from(1, 3), rows, columns, terms, draw.chance(0.5),
                            draw.chance(0.5), /*gap=*/draw.chance(0.5) ? draw.from(0, 40) : 0,
                            draw.seed());
  context = describe(problem);
  const bool corrupted = draw.chance(0.5);
  for (int64_t task = 0; corrupted && task < problem.shape.tasks; ++task) {
    draw.corrupt(problem.a.data() + task * problem.shape.a_stride, problem.shape.a_stride);
    draw.corrupt(problem.b.data() + task * problem.shape.b_stride, problem.shape.b_stride);
  }
  ++tried["batched_product"];
  bool moderate = true;  // apart from values that are not finite
  for (const auto* values : {&problem.a, &problem.b})
    for (const T value : *values)
      moderate = moderate && (!std::isfinite(value) || std::abs(double(value)) <= kModerate<T>);

  const std::vector<T> serial = run_product(problem, cpu::Serial{}, draw.offset());
  if (moderate) check_product(problem, serial);
  on_threads(draw, [&](int, const Threads& pool) {
    return same_bits(run_product(problem, pool, draw.offset()), serial);
  });
  if (!kEmulates) return;
  ++tried["batched_product, emulated CUDA"];
  constexpr shim::Device kDevices[] = {{{132, 66, 33, 16}, {227000, 227000, 227000, 227000}},
                                       {{108}, {163000}}};
  shim::device = draw.one_of(kDevices);
  shim::order = draw.one_of(kOrders);
  context += " cuda, order " + std::to_string(static_cast<int>(shim::order));
  const std::vector<T> device = run_product_on_cuda(problem, draw.offset());
  if (moderate) check_product(problem, device);
  shim::order = draw.one_of(kOrders);
  expect(same_bits(run_product_on_cuda(problem, draw.offset()), device),
         "the order of threads or the alignment changes the bits");
  const int64_t task = draw.from(0, problem.shape.tasks - 1);
  expect(same_bits(run_product_on_cuda(problem.only(task)), part(device, task, problem.results())),
         "a task changes another's bits");
}

template void fuzz_patches<float>(Draw&);
template void fuzz_patches<double>(Draw&);
template void fuzz_channel_sums<float>(Draw&);
template void fuzz_channel_sums<double>(Draw&);
template void fuzz_conv<float>(Draw&);
template void fuzz_conv<double>(Draw&);
template void fuzz_batched_product<float>(Draw&);
template void fuzz_batched_product<double>(Draw&);
template void fuzz_batch_norm<float>(Draw&);
template void fuzz_batch_norm<double>(Draw&);

}  // namespace imaml
