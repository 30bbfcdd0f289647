// The layers with weights for each task, on CUDA. A convolution is made of patches there.
#include <torch/csrc/stable/library.h>

#include "cuda_device.h"
#include "layer_checks.h"

namespace imaml {
namespace {

// Calls launch(stream) where `t` is, and checks the launch.
template <typename Launch>
void launch_at(const char* op, const Tensor& t, const Launch& launch) {
  const Device device(op, t);
  device.check(launch(device.stream()));
}

void check_numbering(const char* op, const PatchShape& s) {
  if (!cuda::fits_patches(s))
    fail(op, "an image, its patches and its padded sides must be below 2^31 values");
}

Tensor patches(const Tensor& x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
               int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  constexpr const char* kName = "patches";
  const auto run = [&](const PatchShape& s, const auto* images, auto* rows) {
    check_numbering(kName, s);
    launch_at(kName, x, [&](void* stream) { return cuda::patches_on(s, images, rows, stream); });
  };
  return patches_by(x, kernel_h, kernel_w, {stride_h, stride_w, pad_h, pad_w}, run);
}

Tensor patches_transpose(const Tensor& g, int64_t in_h, int64_t in_w, int64_t kernel_h,
                         int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                         int64_t pad_w) {
  constexpr const char* kName = "patches_transpose";
  const auto run = [&](const PatchShape& s, const auto* rows, auto* images) {
    check_numbering(kName, s);
    launch_at(kName, g,
              [&](void* stream) { return cuda::patches_transpose_on(s, rows, images, stream); });
  };
  return patches_transpose_by(g, in_h, in_w, kernel_h, kernel_w, {stride_h, stride_w, pad_h, pad_w},
                              run);
}

// Runs a pass of batch norm where x is.
auto run_at(const char* op, const Tensor& x) {
  return [op, &x](const auto& pass) {
    launch_at(op, x, [&](void* stream) { return cuda::batch_norm_on(pass, stream); });
  };
}

Four batch_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, bool relu) {
  return batch_norm_by(x, gamma, beta, eps, relu, run_at("batch_norm", x));
}

Three batch_norm_backward(const Tensor& g, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                          const Tensor& mean, const Tensor& scale, bool relu) {
  return batch_norm_backward_by(g, x, gamma, beta, mean, scale, relu,
                                run_at("batch_norm_backward", x));
}

Three batch_norm_double_backward(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& g,
                                 const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                 const Tensor& mean, const Tensor& scale, bool relu) {
  return batch_norm_double_backward_by(a, b, c, g, x, gamma, beta, mean, scale, relu,
                                       run_at("batch_norm_double_backward", x));
}

}  // namespace
}  // namespace imaml

STABLE_TORCH_LIBRARY_IMPL(imaml, CUDA, m) {
  m.impl("patches", TORCH_BOX(&imaml::patches));
  m.impl("patches_transpose", TORCH_BOX(&imaml::patches_transpose));
  m.impl("batch_norm", TORCH_BOX(&imaml::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&imaml::batch_norm_backward));
  m.impl("batch_norm_double_backward", TORCH_BOX(&imaml::batch_norm_double_backward));
}
