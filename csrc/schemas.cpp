// Every operator of the library. Shapes and meaning are documented in imaml_ext/ops.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(imaml, m) {
  m.def(
      "cg_step_(Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor hp, Tensor lam, float damping, "
      "Tensor(d!) rr, Tensor tol2, Tensor(e!) status, Tensor(f!) steps, Tensor(g!) curvature, "
      "Tensor(h!) beta) -> ()");
  m.def(
      "prox_gd_(Tensor(a!) phi, Tensor(b!)? velocity, Tensor grad, Tensor theta, Tensor lam, "
      "float lr, float momentum, bool nesterov, Tensor? status) -> ()");
  m.def("prox_norms(Tensor phi, Tensor grad, Tensor theta, Tensor lam) -> Tensor");
  m.def("row_dot(Tensor a, Tensor b) -> Tensor");
}
