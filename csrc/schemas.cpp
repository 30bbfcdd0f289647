// The schema of every operator. All take contiguous float32 or float64 tensors.
// imaml_ext/ops/rows.py documents the operators on rows; shapes of the others are below.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(imaml, m) {
  m.def(
      "cg_step_(Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor hp, Tensor lam, float damping, "
      "Tensor? inverse, Tensor(d!) rr, Tensor(e!)? rz, Tensor tol2, Tensor(f!) status, "
      "Tensor(g!) steps, Tensor(h!) curvature, Tensor(i!) beta) -> ()");
  m.def(
      "prox_gd_(Tensor(a!) phi, Tensor(b!)? velocity, Tensor grad, Tensor theta, Tensor lam, "
      "float lr, float momentum, bool nesterov, Tensor? status) -> ()");
  m.def(
      "prox_adam_(Tensor(a!) phi, Tensor(b!) first_moment, Tensor(c!) second_moment, Tensor grad, "
      "Tensor theta, Tensor lam, float lr, float beta1, float beta2, float eps, int step, "
      "Tensor? status) -> ()");
  m.def("prox_norms(Tensor phi, Tensor grad, Tensor theta, Tensor lam) -> Tensor");
  m.def("row_dot(Tensor a, Tensor b) -> Tensor");
  m.def("pull_back(Tensor x, Tensor phi, Tensor theta, Tensor weight, Tensor use) -> Tensor");

  // Layers with one set of weights per task: images [B, N, H, W, C], weights [B, O, C, kH, kW],
  // bias [B, O]; the output is [B, N, H', W', O] with H' = (H + 2 pad_h - kH) / stride_h + 1.
  // Direct convolutions run on the CPU only. patches are [B, N H' W', C kH kW]; conv_shape.h
  // defines them.
  m.def(
      "conv(Tensor x, Tensor w, Tensor? bias, int stride_h, int stride_w, int pad_h, int pad_w) -> "
      "Tensor");
  m.def(
      "conv_data_gradient(Tensor g, Tensor w, int in_h, int in_w, int stride_h, int stride_w, "
      "int pad_h, int pad_w) -> Tensor");
  m.def(
      "conv_weight_gradient(Tensor x, Tensor g, int kernel_h, int kernel_w, int stride_h, "
      "int stride_w, int pad_h, int pad_w) -> Tensor");
  m.def(
      "conv_weight_gradient_(Tensor(a!) dw, Tensor x, Tensor g, int stride_h, int stride_w, "
      "int pad_h, int pad_w) -> ()");
  m.def(
      "patches(Tensor x, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, "
      "int pad_w) -> Tensor");
  m.def(
      "patches_transpose(Tensor g, int in_h, int in_w, int kernel_h, int kernel_w, int stride_h, "
      "int stride_w, int pad_h, int pad_w) -> Tensor");
  m.def("channel_sums(Tensor g) -> Tensor");  // [B, R, C] -> [B, C]
  // op(a) @ op(b) for every task, where op transposes if requested: a [B, M, K] or [B, K, M], b
  // [B, K, N] or [B, N, K], the result [B, M, N]. b need only be contiguous within each task.
  m.def("batched_product(Tensor a, Tensor b, bool transpose_a, bool transpose_b) -> Tensor");

  // x, g, a and the first result [B, R, C], the others [B, C]; norm_formulas.h has the formulas.
  // batch_norm returns y, max(y, 0) (empty without relu), the mean and 1 / sqrt(variance + eps).
  // w, dw, gamma, beta, b and c need only be contiguous within each task.
  m.def(
      "batch_norm(Tensor x, Tensor gamma, Tensor beta, float eps, bool relu) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "batch_norm_backward(Tensor g, Tensor x, Tensor gamma, Tensor beta, Tensor mean, "
      "Tensor scale, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_double_backward(Tensor a, Tensor b, Tensor c, Tensor g, Tensor x, Tensor gamma, "
      "Tensor beta, Tensor mean, Tensor scale, bool relu) -> (Tensor, Tensor, Tensor)");
}
