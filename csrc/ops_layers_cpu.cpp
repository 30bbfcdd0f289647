// The layers with weights for each task, on the CPU: check, then run the kernels under torch's
// thread pool.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "checks.h"
#include "kernels/batch_norm.h"
#include "kernels/conv.h"
#include "threads.h"

namespace imaml {
namespace {

// A tensor of `dims` dimensions, float32 or float64, each task contiguous, and not empty.
void check_tasks(const char* op, const char* name, const Tensor& t, int64_t dims) {
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
void check(const char* op, const char* name, const Tensor& t, int64_t dims) {
  check_tasks(op, name, t, dims);
  if (!t.is_contiguous()) fail(op, name, " must be contiguous");
}

void check_shape(const char* op, const char* name, const Tensor& t, const Tensor& first,
                 std::initializer_list<int64_t> sizes) {
  if (t.scalar_type() != first.scalar_type())
    fail(op, name, " must be ", toString(first.scalar_type()), ", got ", toString(t.scalar_type()));
  if (t.device() != first.device()) fail(op, name, " is on another device");
  int64_t k = 0;
  for (const int64_t size : sizes)
    if (t.size(k++) != size) fail(op, name, " is of a shape that does not fit: ", shape(t));
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& first,
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

Tensor conv(const Tensor& x, const Tensor& w, std::optional<Tensor> bias, int64_t stride_h,
            int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  constexpr const char* kName = "conv";
  check(kName, "x", x, 5);
  check_tasks(kName, "w", w, 5);
  check_shape(kName, "w", w, x, {x.size(0), w.size(1), x.size(4), w.size(3), w.size(4)});
  const cpu::ConvShape s = Window{stride_h, stride_w, pad_h, pad_w}.on(
      kName, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)}, w.size(1), w.size(3),
      w.size(4), w.stride(0));
  if (bias) check_like(kName, "bias", *bias, x, {s.tasks, s.filters});
  Tensor y = new_result(kName, x, {s.tasks, s.images, s.out_h, s.out_w, s.filters});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::conv(s, x.const_data_ptr<T>(), w.const_data_ptr<T>(),
              bias ? bias->const_data_ptr<T>() : nullptr, y.mutable_data_ptr<T>(), threads(),
              parallel_for);
  });
  return y;
}

Tensor conv_data_gradient(const Tensor& g, const Tensor& w, int64_t in_h, int64_t in_w,
                          int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  constexpr const char* kName = "conv_data_gradient";
  check(kName, "g", g, 5);
  check_tasks(kName, "w", w, 5);
  check_shape(kName, "w", w, g, {g.size(0), g.size(4), w.size(2), w.size(3), w.size(4)});
  const cpu::ConvShape s = Window{stride_h, stride_w, pad_h, pad_w}.on(
      kName, {g.size(0), g.size(1), in_h, in_w, w.size(2)}, w.size(1), w.size(3), w.size(4),
      w.stride(0));
  check_like(kName, "g", g, w, {s.tasks, s.images, s.out_h, s.out_w, s.filters});
  Tensor dx = new_result(kName, g, {s.tasks, s.images, s.in_h, s.in_w, s.channels});
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    cpu::conv_data_gradient(s, g.const_data_ptr<T>(), w.const_data_ptr<T>(),
                            dx.mutable_data_ptr<T>(), threads(), parallel_for);
  });
  return dx;
}

Tensor conv_weight_gradient(const Tensor& x, const Tensor& g, int64_t kernel_h, int64_t kernel_w,
                            int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  constexpr const char* kName = "conv_weight_gradient";
  check(kName, "x", x, 5);
  check(kName, "g", g, 5);
  const cpu::ConvShape s = Window{stride_h, stride_w, pad_h, pad_w}.on(
      kName, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)}, g.size(4), kernel_h, kernel_w,
      0);
  check_like(kName, "g", g, x, {s.tasks, s.images, s.out_h, s.out_w, s.filters});
  Tensor dw = new_result(kName, x, {s.tasks, s.filters, s.channels, kernel_h, kernel_w});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::conv_weight_gradient(s, x.const_data_ptr<T>(), g.const_data_ptr<T>(),
                              dw.mutable_data_ptr<T>(), threads(), parallel_for);
  });
  return dw;
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

NormShape norm_shape(const char* op, const Tensor& x) {
  check(op, "x", x, 3);
  return {x.size(0), x.size(1), x.size(2)};
}

void check_images(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_like(op, name, t, x, {x.size(0), x.size(1), x.size(2)});
}

void check_channels(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_like(op, name, t, x, {x.size(0), x.size(2)});
}

Three batch_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps) {
  constexpr const char* kName = "batch_norm";
  const NormShape s = norm_shape(kName, x);
  check_channels(kName, "gamma", gamma, x);
  check_channels(kName, "beta", beta, x);
  if (!(eps > 0)) fail(kName, "eps must be positive, got ", eps);
  Tensor y = torch::stable::empty_like(x), mean = torch::stable::empty_like(gamma);
  Tensor scale = torch::stable::empty_like(gamma);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::batch_norm(NormForward<T>{.shape = s,
                                        .eps = eps,
                                        .x = x.const_data_ptr<T>(),
                                        .gamma = gamma.const_data_ptr<T>(),
                                        .beta = beta.const_data_ptr<T>(),
                                        .y = y.mutable_data_ptr<T>(),
                                        .mean = mean.mutable_data_ptr<T>(),
                                        .scale = scale.mutable_data_ptr<T>()},
                    threads(), parallel_for);
  });
  return {y, mean, scale};
}

Three batch_norm_backward(const Tensor& g, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                          const Tensor& mean, const Tensor& scale, bool relu) {
  constexpr const char* kName = "batch_norm_backward";
  const NormShape s = norm_shape(kName, x);
  check_images(kName, "g", g, x);
  check_channels(kName, "gamma", gamma, x);
  check_channels(kName, "beta", beta, x);
  check_channels(kName, "mean", mean, x);
  check_channels(kName, "scale", scale, x);
  Tensor dx = torch::stable::empty_like(x), dgamma = torch::stable::empty_like(gamma);
  Tensor dbeta = torch::stable::empty_like(gamma);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::batch_norm(NormBackward<T>{.shape = s,
                                         .relu = relu,
                                         .g = g.const_data_ptr<T>(),
                                         .x = x.const_data_ptr<T>(),
                                         .gamma = gamma.const_data_ptr<T>(),
                                         .beta = beta.const_data_ptr<T>(),
                                         .mean = mean.const_data_ptr<T>(),
                                         .scale = scale.const_data_ptr<T>(),
                                         .dx = dx.mutable_data_ptr<T>(),
                                         .dgamma = dgamma.mutable_data_ptr<T>(),
                                         .dbeta = dbeta.mutable_data_ptr<T>()},
                    threads(), parallel_for);
  });
  return {dx, dgamma, dbeta};
}

Three batch_norm_double_backward(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& g,
                                 const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                 const Tensor& mean, const Tensor& scale, bool relu) {
  constexpr const char* kName = "batch_norm_double_backward";
  const NormShape s = norm_shape(kName, x);
  check_images(kName, "a", a, x);
  check_images(kName, "g", g, x);
  check_channels(kName, "b", b, x);
  check_channels(kName, "c", c, x);
  check_channels(kName, "gamma", gamma, x);
  check_channels(kName, "beta", beta, x);
  check_channels(kName, "mean", mean, x);
  check_channels(kName, "scale", scale, x);
  Tensor to_g = torch::stable::empty_like(x), to_x = torch::stable::empty_like(x);
  Tensor to_gamma = torch::stable::empty_like(gamma);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::batch_norm(NormDoubleBackward<T>{.shape = s,
                                               .relu = relu,
                                               .a = a.const_data_ptr<T>(),
                                               .b = b.const_data_ptr<T>(),
                                               .c = c.const_data_ptr<T>(),
                                               .g = g.const_data_ptr<T>(),
                                               .x = x.const_data_ptr<T>(),
                                               .gamma = gamma.const_data_ptr<T>(),
                                               .beta = beta.const_data_ptr<T>(),
                                               .mean = mean.const_data_ptr<T>(),
                                               .scale = scale.const_data_ptr<T>(),
                                               .to_g = to_g.mutable_data_ptr<T>(),
                                               .to_x = to_x.mutable_data_ptr<T>(),
                                               .to_gamma = to_gamma.mutable_data_ptr<T>()},
                    threads(), parallel_for);
  });
  return {to_g, to_x, to_gamma};
}

}  // namespace
}  // namespace imaml

STABLE_TORCH_LIBRARY_IMPL(imaml, CPU, m) {
  m.impl("conv", TORCH_BOX(&imaml::conv));
  m.impl("conv_data_gradient", TORCH_BOX(&imaml::conv_data_gradient));
  m.impl("conv_weight_gradient", TORCH_BOX(&imaml::conv_weight_gradient));
  m.impl("batch_norm", TORCH_BOX(&imaml::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&imaml::batch_norm_backward));
  m.impl("batch_norm_double_backward", TORCH_BOX(&imaml::batch_norm_double_backward));
}
