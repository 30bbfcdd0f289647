// Every operator of the library. Shapes and meaning are documented in imaml_ext/ops.py.
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
      "patches(Tensor x, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, "
      "int pad_w) -> Tensor");
  m.def(
      "patches_transpose(Tensor g, int in_h, int in_w, int kernel_h, int kernel_w, int stride_h, "
      "int stride_w, int pad_h, int pad_w) -> Tensor");
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
