// Checks of the layers' arguments, and the passes made from them. Shared by the CPU and the CUDA
// side.
#pragma once
#include <limits>
#include <tuple>

#include "checks.h"
#include "kernels/conv.h"
#include "kernels/norm_formulas.h"
#include "kernels/patches.h"

namespace imaml {

// A tensor of `dims` dimensions, float32 or float64, each task contiguous, and not empty.
inline void check_tasks(const char* op, const char* name, const Tensor& t, int64_t dims) {
  if (t.dim() != dims) fail(op, name, " must have ", dims, " dimensions, got ", shape(t));
  if (t.scalar_type() != ScalarType::Float && t.scalar_type() != ScalarType::Double)
    fail(op, name, " must be float32 or float64, got ", toString(t.scalar_type()));
  if (t.numel() == 0) fail(op, name, " is empty: ", shape(t));
  int64_t step = 1;
  for (int64_t k = dims - 1; k > 0; --k) {
    if (t.size(k) != 1 && t.stride(k) != step) fail(op, name, " must be contiguous");
    step *= t.size(k);
  }
}

// The same, contiguous as a whole.
inline void check(const char* op, const char* name, const Tensor& t, int64_t dims) {
  check_tasks(op, name, t, dims);
  if (!t.is_contiguous()) fail(op, name, " must be contiguous");
}

inline void check_shape(const char* op, const char* name, const Tensor& t, const Tensor& first,
                        std::initializer_list<int64_t> sizes) {
  if (t.scalar_type() != first.scalar_type())
    fail(op, name, " must be ", toString(first.scalar_type()), ", got ", toString(t.scalar_type()));
  if (t.device() != first.device()) fail(op, name, " is on another device");
  int64_t k = 0;
  for (const int64_t size : sizes)
    if (t.size(k++) != size) fail(op, name, " is of a shape that does not fit: ", shape(t));
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& first,
                       std::initializer_list<int64_t> sizes) {
  check(op, name, t, static_cast<int64_t>(sizes.size()));
  check_shape(op, name, t, first, sizes);
}

struct Window {
  // With larger ones the places of pixels would not fit into 64 bits.
  static constexpr int64_t kLargest = std::numeric_limits<std::int32_t>::max();

  int64_t stride_h, stride_w, pad_h, pad_w;

  // `images` [B, N, H, W, C] convolved with weights [B, O, C, kH, kW], `apart` from task to task.
  cpu::ConvShape on(const char* op, std::initializer_list<int64_t> images, int64_t filters,
                    int64_t kernel_h, int64_t kernel_w, int64_t apart) const {
    const int64_t* size = images.begin();
    cpu::ConvShape s{.tasks = size[0],
                     .images = size[1],
                     .in_h = size[2],
                     .in_w = size[3],
                     .channels = size[4],
                     .out_h = 0,
                     .out_w = 0,
                     .filters = filters,
                     .kernel_h = kernel_h,
                     .kernel_w = kernel_w,
                     .stride_h = stride_h,
                     .stride_w = stride_w,
                     .pad_h = pad_h,
                     .pad_w = pad_w,
                     .task_weights = apart};
    if (stride_h < 1 || stride_w < 1) fail(op, "stride must be positive");
    if (pad_h < 0 || pad_w < 0) fail(op, "padding must not be negative");
    for (const int64_t number :
         {s.in_h, s.in_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w})
      if (number > kLargest) fail(op, "sizes of a window must be below 2^31, got ", number);
    const int64_t room_h = s.in_h + 2 * pad_h - kernel_h, room_w = s.in_w + 2 * pad_w - kernel_w;
    if (room_h < 0 || room_w < 0 || s.in_h < 1 || s.in_w < 1 || kernel_h < 1 || kernel_w < 1)
      fail(op, "a ", kernel_h, " x ", kernel_w, " kernel does not fit into ", s.in_h, " x ", s.in_w,
           " padded by ", pad_h, " x ", pad_w);
    s.out_h = room_h / stride_h + 1;
    s.out_w = room_w / stride_w + 1;
    return s;
  }
};

// ---- patches -----------------------------------------------------------------------------------

inline int64_t product_of(const char* op, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(product, size, &product)) fail(op, "sizes are too large");
  return product;
}

// Of `images` [B, N, H, W, C], for rows [B, N H' W', C kH kW].
inline PatchShape patch_shape(const char* op, std::initializer_list<int64_t> images,
                              int64_t kernel_h, int64_t kernel_w, const Window& window) {
  const cpu::ConvShape s = window.on(op, images, 1, kernel_h, kernel_w, 0);
  product_of(op, {s.tasks, s.images, s.out_h, s.out_w, s.channels, kernel_h, kernel_w});
  return {.images = s.tasks * s.images,
          .in_h = s.in_h,
          .in_w = s.in_w,
          .channels = s.channels,
          .out_h = s.out_h,
          .out_w = s.out_w,
          .kernel_h = kernel_h,
          .kernel_w = kernel_w,
          .stride_h = s.stride_h,
          .stride_w = s.stride_w,
          .pad_h = s.pad_h,
          .pad_w = s.pad_w};
}

// Calls run(shape, images, rows), which writes the rows.
template <typename Run>
Tensor patches_by(const Tensor& x, int64_t kernel_h, int64_t kernel_w, const Window& window,
                  const Run& run) {
  constexpr const char* kName = "patches";
  check(kName, "x", x, 5);
  const PatchShape s = patch_shape(kName, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)},
                                   kernel_h, kernel_w, window);
  Tensor rows = new_result(kName, x, {x.size(0), x.size(1) * s.out_h * s.out_w, s.columns()});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    run(s, x.const_data_ptr<T>(), rows.mutable_data_ptr<T>());
  });
  return rows;
}

// Calls run(shape, rows, images), which writes the images.
template <typename Run>
Tensor patches_transpose_by(const Tensor& g, int64_t in_h, int64_t in_w, int64_t kernel_h,
                            int64_t kernel_w, const Window& window, const Run& run) {
  constexpr const char* kName = "patches_transpose";
  check(kName, "g", g, 3);
  const PatchShape one = patch_shape(kName, {1, 1, in_h, in_w, 1}, kernel_h, kernel_w, window);
  const int64_t pixels = one.out_h * one.out_w;
  if (g.size(1) % pixels != 0 || g.size(2) % one.taps() != 0)
    fail(kName, "g must be [B, N ", pixels, ", C ", one.taps(), "], got ", shape(g));
  const int64_t images = g.size(1) / pixels, channels = g.size(2) / one.taps();
  const PatchShape s =
      patch_shape(kName, {g.size(0), images, in_h, in_w, channels}, kernel_h, kernel_w, window);
  Tensor x = new_result(kName, g, {g.size(0), images, in_h, in_w, channels});
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    run(s, g.const_data_ptr<T>(), x.mutable_data_ptr<T>());
  });
  return x;
}

// ---- batch norm --------------------------------------------------------------------------------

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Checks images against x, and what has one entry a channel.
class NormChecker {
 public:
  NormChecker(const char* op, const Tensor& x) : op_(op), x_(x) { check(op, "x", x, 3); }

  NormShape shape() const { return {x_.size(0), x_.size(1), x_.size(2)}; }
  const NormChecker& images(const char* name, const Tensor& t) const {
    check_like(op_, name, t, x_, {x_.size(0), x_.size(1), x_.size(2)});
    return *this;
  }
  const NormChecker& channels(const char* name, const Tensor& t) const {
    check_like(op_, name, t, x_, {x_.size(0), x_.size(2)});
    return *this;
  }
  // Rows of which may lie apart.
  const NormChecker& task_channels(const char* name, const Tensor& t) const {
    check_tasks(op_, name, t, 2);
    check_shape(op_, name, t, x_, {x_.size(0), x_.size(2)});
    return *this;
  }

 private:
  const char* op_;
  const Tensor& x_;
};

template <typename T>
TaskChannels<T> task_channels(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0) - t.size(1)};
}

inline Tensor new_channels(const char* op, const Tensor& x) {
  return new_result(op, x, {x.size(0), x.size(2)});
}

// Calls run(pass), which runs a NormForward.
template <typename Run>
Four batch_norm_by(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, bool relu,
                   const Run& run) {
  constexpr const char* kName = "batch_norm";
  const NormChecker checker(kName, x);
  checker.task_channels("gamma", gamma).task_channels("beta", beta);
  if (!(eps > 0)) fail(kName, "eps must be positive, got ", eps);
  Tensor y = torch::stable::empty_like(x);
  Tensor positive = relu ? torch::stable::empty_like(x) : new_result(kName, x, {0});
  Tensor mean = new_channels(kName, x), scale = new_channels(kName, x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    run(NormForward<T>{.shape = checker.shape(),
                       .eps = eps,
                       .x = x.const_data_ptr<T>(),
                       .gamma = task_channels<T>(gamma),
                       .beta = task_channels<T>(beta),
                       .y = y.mutable_data_ptr<T>(),
                       .positive = relu ? positive.mutable_data_ptr<T>() : nullptr,
                       .mean = mean.mutable_data_ptr<T>(),
                       .scale = scale.mutable_data_ptr<T>()});
  });
  return {y, positive, mean, scale};
}

// Calls run(pass), which runs a NormBackward.
template <typename Run>
Three batch_norm_backward_by(const Tensor& g, const Tensor& x, const Tensor& gamma,
                             const Tensor& beta, const Tensor& mean, const Tensor& scale, bool relu,
                             const Run& run) {
  constexpr const char* kName = "batch_norm_backward";
  const NormChecker checker(kName, x);
  checker.images("g", g)
      .task_channels("gamma", gamma)
      .task_channels("beta", beta)
      .channels("mean", mean)
      .channels("scale", scale);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dgamma = new_channels(kName, x), dbeta = new_channels(kName, x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    run(NormBackward<T>{.shape = checker.shape(),
                        .relu = relu,
                        .g = g.const_data_ptr<T>(),
                        .x = x.const_data_ptr<T>(),
                        .gamma = task_channels<T>(gamma),
                        .beta = task_channels<T>(beta),
                        .mean = mean.const_data_ptr<T>(),
                        .scale = scale.const_data_ptr<T>(),
                        .dx = dx.mutable_data_ptr<T>(),
                        .dgamma = dgamma.mutable_data_ptr<T>(),
                        .dbeta = dbeta.mutable_data_ptr<T>()});
  });
  return {dx, dgamma, dbeta};
}

// Calls run(pass), which runs a NormDoubleBackward.
template <typename Run>
Three batch_norm_double_backward_by(const Tensor& a, const Tensor& b, const Tensor& c,
                                    const Tensor& g, const Tensor& x, const Tensor& gamma,
                                    const Tensor& beta, const Tensor& mean, const Tensor& scale,
                                    bool relu, const Run& run) {
  constexpr const char* kName = "batch_norm_double_backward";
  const NormChecker checker(kName, x);
  checker.images("a", a)
      .images("g", g)
      .task_channels("b", b)
      .task_channels("c", c)
      .task_channels("gamma", gamma)
      .task_channels("beta", beta)
      .channels("mean", mean)
      .channels("scale", scale);
  Tensor to_g = torch::stable::empty_like(x), to_x = torch::stable::empty_like(x);
  Tensor to_gamma = new_channels(kName, x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    run(NormDoubleBackward<T>{.shape = checker.shape(),
                              .relu = relu,
                              .a = a.const_data_ptr<T>(),
                              .b = task_channels<T>(b),
                              .c = task_channels<T>(c),
                              .g = g.const_data_ptr<T>(),
                              .x = x.const_data_ptr<T>(),
                              .gamma = task_channels<T>(gamma),
                              .beta = task_channels<T>(beta),
                              .mean = mean.const_data_ptr<T>(),
                              .scale = scale.const_data_ptr<T>(),
                              .to_g = to_g.mutable_data_ptr<T>(),
                              .to_x = to_x.mutable_data_ptr<T>(),
                              .to_gamma = to_gamma.mutable_data_ptr<T>()});
  });
  return {to_g, to_x, to_gamma};
}

}  // namespace imaml
