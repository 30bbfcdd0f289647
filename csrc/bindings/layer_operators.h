// The operators of the layers, for either device; see row_operators.h. Only the CPU has direct
// convolutions: on CUDA a convolution is a matrix product with patches.
#pragma once
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "bindings/checks.h"
#include "conv_shape.h"
#include "norm_formulas.h"
#include "product_shape.h"

namespace imaml {

// ---- convolutions and patches ------------------------------------------------------------------

struct Window {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;

  // The convolution of images [B, N, H, W, C] with `filters` filters. Throws unless the window fits
  // and no index overflows 64 bits.
  ConvShape on(const char* op, Sizes images, int64_t filters, int64_t task_stride) const {
    const int64_t* size = images.begin();
    ConvShape s{.tasks = size[0],
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
                .task_stride = task_stride};
    if (stride_h < 1 || stride_w < 1)
      fail(op, "stride must be positive, got ", stride_h, " x ", stride_w);
    if (pad_h < 0 || pad_w < 0) fail(op, "padding must not be negative, got ", pad_h, " x ", pad_w);
    for (const int64_t value :
         {s.in_h, s.in_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w})
      if (value > std::numeric_limits<std::int32_t>::max())
        fail(op, "image, kernel, stride and padding sizes must be below 2^31, got ", value);
    const int64_t room_h = s.in_h + 2 * pad_h - kernel_h, room_w = s.in_w + 2 * pad_w - kernel_w;
    if (room_h < 0 || room_w < 0 || s.in_h < 1 || s.in_w < 1 || kernel_h < 1 || kernel_w < 1)
      fail(op, "a ", kernel_h, " x ", kernel_w, " kernel does not fit into a ", s.in_h, " x ",
           s.in_w, " image padded by ", pad_h, " x ", pad_w);
    s.out_h = room_h / stride_h + 1;
    s.out_w = room_w / stride_w + 1;
    return s;
  }

  // The same, for the patches [B, N H' W', C kH kW] of the images.
  ConvShape patches_of(const char* op, Sizes images) const {
    const ConvShape s = on(op, images, 1, 0);
    int64_t total = 1;
    for (const int64_t size :
         {s.tasks, s.images, s.out_h, s.out_w, s.channels, s.kernel_h, s.kernel_w})
      if (__builtin_mul_overflow(total, size, &total)) fail(op, "patches have 2^63 or more values");
    return s;
  }
};

template <typename Device>
Tensor conv(const Tensor& x, const Tensor& w, std::optional<Tensor> bias, int64_t stride_h,
            int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  constexpr const char* kName = "conv";
  const Checker checker(kName, "x", x, 5, Empty::kRefused);
  checker.per_task("w", w, {x.size(0), kAny, x.size(4), kAny, kAny});
  const ConvShape s = Window{w.size(3), w.size(4), stride_h, stride_w, pad_h, pad_w}.on(
      kName, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)}, w.size(1), w.stride(0));
  if (bias) checker.operand("bias", *bias, {s.tasks, s.filters});
  Tensor y = new_result(kName, x, {s.tasks, s.images, s.out_h, s.out_w, s.filters});
  const Device device(kName, x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    device.conv(s, x.const_data_ptr<T>(), w.const_data_ptr<T>(),
                bias ? bias->const_data_ptr<T>() : nullptr, y.mutable_data_ptr<T>());
  });
  return y;
}

template <typename Device>
Tensor conv_data_gradient(const Tensor& g, const Tensor& w, int64_t in_h, int64_t in_w,
                          int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  constexpr const char* kName = "conv_data_gradient";
  const Checker checker(kName, "g", g, 5, Empty::kRefused);
  checker.per_task("w", w, {g.size(0), g.size(4), kAny, kAny, kAny});
  const ConvShape s = Window{w.size(3), w.size(4), stride_h, stride_w, pad_h, pad_w}.on(
      kName, {g.size(0), g.size(1), in_h, in_w, w.size(2)}, w.size(1), w.stride(0));
  checker.operand("g", g, {s.tasks, s.images, s.out_h, s.out_w, s.filters});
  Tensor dx = new_result(kName, g, {s.tasks, s.images, s.in_h, s.in_w, s.channels});
  const Device device(kName, g);
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    device.conv_data_gradient(s, g.const_data_ptr<T>(), w.const_data_ptr<T>(),
                              dx.mutable_data_ptr<T>());
  });
  return dx;
}

// For weight gradients whose tasks follow each other.
inline ConvShape weight_gradient_shape(const char* op, const Tensor& x, const Tensor& g,
                                       const Window& window) {
  const Checker checker(op, "x", x, 5, Empty::kRefused);
  checker.operand("g", g, {x.size(0), x.size(1), kAny, kAny, kAny});
  ConvShape s = window.on(op, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)}, g.size(4),
                          /*task_stride=*/0);
  s.task_stride = s.weights();
  checker.operand("g", g, {s.tasks, s.images, s.out_h, s.out_w, s.filters});
  return s;
}

template <typename Device>
void launch_weight_gradient(const char* op, const ConvShape& s, const Tensor& x, const Tensor& g,
                            Tensor& dw) {
  const Device device(op, x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    device.conv_weight_gradient(s, x.const_data_ptr<T>(), g.const_data_ptr<T>(),
                                dw.mutable_data_ptr<T>());
  });
}

template <typename Device>
Tensor conv_weight_gradient(const Tensor& x, const Tensor& g, int64_t kernel_h, int64_t kernel_w,
                            int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  constexpr const char* kName = "conv_weight_gradient";
  const ConvShape s = weight_gradient_shape(
      kName, x, g, Window{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w});
  Tensor dw = new_result(kName, x, {s.tasks, s.filters, s.channels, kernel_h, kernel_w});
  launch_weight_gradient<Device>(kName, s, x, g, dw);
  return dw;
}

template <typename Device>
void conv_weight_gradient_(Tensor dw, const Tensor& x, const Tensor& g, int64_t stride_h,
                           int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  constexpr const char* kName = "conv_weight_gradient_";
  const Checker checker(kName, "x", x, 5, Empty::kRefused);
  checker.per_task("dw", dw, {x.size(0), kAny, x.size(4), kAny, kAny});
  ConvShape s = weight_gradient_shape(
      kName, x, g, Window{dw.size(3), dw.size(4), stride_h, stride_w, pad_h, pad_w});
  checker.per_task("dw", dw, {s.tasks, s.filters, s.channels, s.kernel_h, s.kernel_w});
  s.task_stride = dw.stride(0);
  if (s.tasks > 1 && s.task_stride < s.weights())
    fail(kName, "dw is written, so its tasks must not overlap, got stride ", s.task_stride);
  check_no_alias(kName, {{"dw", dw}}, {{"x", x}, {"g", g}});
  launch_weight_gradient<Device>(kName, s, x, g, dw);
}

template <typename Device>
Tensor patches(const Tensor& x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
               int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  constexpr const char* kName = "patches";
  const Checker checker(kName, "x", x, 5, Empty::kRefused);
  const ConvShape s = Window{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w}.patches_of(
      kName, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)});
  Tensor rows = new_result(kName, x, {s.tasks, s.images * s.out_pixels(), s.patch_size()});
  const Device device(kName, x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    device.patches(s, x.const_data_ptr<T>(), rows.mutable_data_ptr<T>());
  });
  return rows;
}

template <typename Device>
Tensor patches_transpose(const Tensor& g, int64_t in_h, int64_t in_w, int64_t kernel_h,
                         int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                         int64_t pad_w) {
  constexpr const char* kName = "patches_transpose";
  const Checker checker(kName, "g", g, 3, Empty::kRefused);
  const Window window{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w};
  const ConvShape one = window.patches_of(kName, {1, 1, in_h, in_w, 1});
  if (g.size(1) % one.out_pixels() != 0 || g.size(2) % one.taps() != 0)
    fail(kName, "g must be [B, N * ", one.out_pixels(), ", C * ", one.taps(), "], got ", shape(g));
  const ConvShape s = window.patches_of(
      kName, {g.size(0), g.size(1) / one.out_pixels(), in_h, in_w, g.size(2) / one.taps()});
  Tensor x = new_result(kName, g, {s.tasks, s.images, s.in_h, s.in_w, s.channels});
  const Device device(kName, g);
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    device.patches_transpose(s, g.const_data_ptr<T>(), x.mutable_data_ptr<T>());
  });
  return x;
}

template <typename Device>
Tensor channel_sums(const Tensor& g) {
  constexpr const char* kName = "channel_sums";
  const Checker checker(kName, "g", g, 3, Empty::kRefused);
  Tensor out = new_result(kName, g, {g.size(0), g.size(2)});
  const Device device(kName, g);
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    device.channel_sums(NormShape{g.size(0), g.size(1), g.size(2)}, g.const_data_ptr<T>(),
                        out.mutable_data_ptr<T>());
  });
  return out;
}

template <typename Device>
Tensor batched_product(const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b) {
  constexpr const char* kName = "batched_product";
  const Checker checker(kName, "a", a, 3, Empty::kRefused);
  const int64_t tasks = a.size(0), terms = a.size(transpose_a ? 1 : 2);
  checker.per_task("b", b, {tasks, transpose_b ? kAny : terms, transpose_b ? terms : kAny});
  const ProductShape s{.tasks = tasks,
                       .rows = a.size(transpose_a ? 2 : 1),
                       .columns = b.size(transpose_b ? 1 : 2),
                       .terms = terms,
                       .a_stride = a.size(1) * a.size(2),
                       .b_stride = b.stride(0),
                       .transpose_a = transpose_a,
                       .transpose_b = transpose_b};
  Tensor y = new_result(kName, a, {s.tasks, s.rows, s.columns});
  const Device device(kName, a);
  dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    device.batched_product(s, a.const_data_ptr<T>(), b.const_data_ptr<T>(),
                           y.mutable_data_ptr<T>());
  });
  return y;
}

// ---- batch norm --------------------------------------------------------------------------------

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
TaskChannels<T> task_channels(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0) - t.size(1)};
}

inline NormShape norm_shape(const Tensor& x) { return {x.size(0), x.size(1), x.size(2)}; }

inline Tensor new_channels(const char* op, const Tensor& x) {
  return new_result(op, x, {x.size(0), x.size(2)});
}

template <typename Device>
Four batch_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, bool relu) {
  constexpr const char* kName = "batch_norm";
  Checker(kName, "x", x, 3, Empty::kRefused)
      .per_task("gamma", gamma, {x.size(0), x.size(2)})
      .per_task("beta", beta, {x.size(0), x.size(2)});
  if (!(eps > 0)) fail(kName, "eps must be positive, got ", eps);
  Tensor y = torch::stable::empty_like(x);
  Tensor positive = relu ? torch::stable::empty_like(x) : new_result(kName, x, {0});
  Tensor mean = new_channels(kName, x), scale = new_channels(kName, x);
  const Device device(kName, x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    device.batch_norm(NormForward<T>{.shape = norm_shape(x),
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

// The arguments that both derivatives share.
struct NormTensors {
  const char* op;
  const Tensor &g, &x, &gamma, &beta, &mean, &scale;
  bool relu;

  Checker check() const {
    const Checker checker(op, "x", x, 3, Empty::kRefused);
    const int64_t tasks = x.size(0), channels = x.size(2);
    return checker.operand("g", g, {tasks, x.size(1), channels})
        .per_task("gamma", gamma, {tasks, channels})
        .per_task("beta", beta, {tasks, channels})
        .operand("mean", mean, {tasks, channels})
        .operand("scale", scale, {tasks, channels});
  }

  template <typename T>
  NormOperands<T> operands() const {
    return {.shape = norm_shape(x),
            .relu = relu,
            .g = g.const_data_ptr<T>(),
            .x = x.const_data_ptr<T>(),
            .gamma = task_channels<T>(gamma),
            .beta = task_channels<T>(beta),
            .mean = mean.const_data_ptr<T>(),
            .scale = scale.const_data_ptr<T>()};
  }
};

template <typename Device>
Three batch_norm_backward(const Tensor& g, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                          const Tensor& mean, const Tensor& scale, bool relu) {
  const NormTensors norm{"batch_norm_backward", g, x, gamma, beta, mean, scale, relu};
  norm.check();
  Tensor dx = torch::stable::empty_like(x);
  Tensor dgamma = new_channels(norm.op, x), dbeta = new_channels(norm.op, x);
  const Device device(norm.op, x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    device.batch_norm(NormBackward<T>{norm.operands<T>(), dx.mutable_data_ptr<T>(),
                                      dgamma.mutable_data_ptr<T>(), dbeta.mutable_data_ptr<T>()});
  });
  return {dx, dgamma, dbeta};
}

template <typename Device>
Three batch_norm_double_backward(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& g,
                                 const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                 const Tensor& mean, const Tensor& scale, bool relu) {
  const NormTensors norm{"batch_norm_double_backward", g, x, gamma, beta, mean, scale, relu};
  norm.check()
      .operand("a", a, {x.size(0), x.size(1), x.size(2)})
      .per_task("b", b, {x.size(0), x.size(2)})
      .per_task("c", c, {x.size(0), x.size(2)});
  Tensor grad_g = torch::stable::empty_like(x), grad_x = torch::stable::empty_like(x);
  Tensor grad_gamma = new_channels(norm.op, x);
  const Device device(norm.op, x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    device.batch_norm(
        NormDoubleBackward<T>{norm.operands<T>(), a.const_data_ptr<T>(), task_channels<T>(b),
                              task_channels<T>(c), grad_g.mutable_data_ptr<T>(),
                              grad_x.mutable_data_ptr<T>(), grad_gamma.mutable_data_ptr<T>()});
  });
  return {grad_g, grad_x, grad_gamma};
}

template <typename Device, typename Library>
void register_direct_convolutions(Library& m) {
  m.impl("conv", TORCH_BOX(&conv<Device>));
  m.impl("conv_data_gradient", TORCH_BOX(&conv_data_gradient<Device>));
  m.impl("conv_weight_gradient", TORCH_BOX(&conv_weight_gradient<Device>));
  m.impl("conv_weight_gradient_", TORCH_BOX(&conv_weight_gradient_<Device>));
}

template <typename Device, typename Library>
void register_layers(Library& m) {
  m.impl("patches", TORCH_BOX(&patches<Device>));
  m.impl("patches_transpose", TORCH_BOX(&patches_transpose<Device>));
  m.impl("channel_sums", TORCH_BOX(&channel_sums<Device>));
  m.impl("batched_product", TORCH_BOX(&batched_product<Device>));
  m.impl("batch_norm", TORCH_BOX(&batch_norm<Device>));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward<Device>));
  m.impl("batch_norm_double_backward", TORCH_BOX(&batch_norm_double_backward<Device>));
}

}  // namespace imaml
