// The layers with weights for each task, on the CPU: check, then run the kernels under torch's
// thread pool.
#include <torch/csrc/stable/library.h>

#include "kernels/batch_norm.h"
#include "layer_checks.h"
#include "threads.h"

namespace imaml {
namespace {

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

Tensor patches(const Tensor& x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
               int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  return patches_by(x, kernel_h, kernel_w, {stride_h, stride_w, pad_h, pad_w},
                    [](const PatchShape& s, const auto* images, auto* rows) {
                      cpu::patches(s, images, rows, parallel_for);
                    });
}

Tensor patches_transpose(const Tensor& g, int64_t in_h, int64_t in_w, int64_t kernel_h,
                         int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                         int64_t pad_w) {
  return patches_transpose_by(g, in_h, in_w, kernel_h, kernel_w, {stride_h, stride_w, pad_h, pad_w},
                              [](const PatchShape& s, const auto* rows, auto* images) {
                                cpu::patches_transpose(s, rows, images, parallel_for);
                              });
}

constexpr auto run_norm = [](const auto& pass) { cpu::batch_norm(pass, threads(), parallel_for); };

Four batch_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, bool relu) {
  return batch_norm_by(x, gamma, beta, eps, relu, run_norm);
}

Three batch_norm_backward(const Tensor& g, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                          const Tensor& mean, const Tensor& scale, bool relu) {
  return batch_norm_backward_by(g, x, gamma, beta, mean, scale, relu, run_norm);
}

Three batch_norm_double_backward(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& g,
                                 const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                 const Tensor& mean, const Tensor& scale, bool relu) {
  return batch_norm_double_backward_by(a, b, c, g, x, gamma, beta, mean, scale, relu, run_norm);
}

}  // namespace
}  // namespace imaml

STABLE_TORCH_LIBRARY_IMPL(imaml, CPU, m) {
  m.impl("conv", TORCH_BOX(&imaml::conv));
  m.impl("conv_data_gradient", TORCH_BOX(&imaml::conv_data_gradient));
  m.impl("conv_weight_gradient", TORCH_BOX(&imaml::conv_weight_gradient));
  m.impl("patches", TORCH_BOX(&imaml::patches));
  m.impl("patches_transpose", TORCH_BOX(&imaml::patches_transpose));
  m.impl("batch_norm", TORCH_BOX(&imaml::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&imaml::batch_norm_backward));
  m.impl("batch_norm_double_backward", TORCH_BOX(&imaml::batch_norm_double_backward));
}
