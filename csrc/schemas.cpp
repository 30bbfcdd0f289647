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
}
