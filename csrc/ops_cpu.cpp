// The operators on the CPU: check, then run the kernels under torch's thread pool.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "kernels/cpu_drivers.h"
#include "threads.h"

namespace imaml {
namespace {

void cg_step_(Tensor x, Tensor r, Tensor p, const Tensor& hp, const Tensor& lam, double damping,
              std::optional<Tensor> inverse, Tensor rr, std::optional<Tensor> rz,
              const Tensor& tol2, Tensor status, Tensor steps, Tensor curvature, Tensor beta) {
  const CgTensors tensors{x,  r,  p,    hp,     lam,   damping,   inverse,
                          rr, rz, tol2, status, steps, curvature, beta};
  tensors.check();
  dispatch(
      x, [&](auto zero) { cpu::cg_step(tensors.args<decltype(zero)>(), threads(), parallel_for); });
}

template <typename StepTensors>
void prox_step(const StepTensors& tensors) {
  tensors.check();
  dispatch(tensors.prox.phi, [&](auto zero) {
    using T = decltype(zero);
    cpu::prox_step(tensors.prox.template args<T>(), tensors.template rule<T>(), threads(),
                   parallel_for);
  });
}

void prox_gd_(Tensor phi, std::optional<Tensor> velocity, const Tensor& grad, const Tensor& theta,
              const Tensor& lam, double lr, double momentum, bool nesterov,
              std::optional<Tensor> status) {
  prox_step(DescentTensors{{phi, grad, theta, lam, status}, velocity, lr, momentum, nesterov});
}

void prox_adam_(Tensor phi, Tensor first_moment, Tensor second_moment, const Tensor& grad,
                const Tensor& theta, const Tensor& lam, double lr, double beta1, double beta2,
                double eps, int64_t step, std::optional<Tensor> status) {
  prox_step(AdamTensors{
      {phi, grad, theta, lam, status}, first_moment, second_moment, {lr, beta1, beta2, eps, step}});
}

Tensor prox_norms(const Tensor& phi, const Tensor& grad, const Tensor& theta, const Tensor& lam) {
  const ProxTensors tensors{phi, grad, theta, lam};
  tensors.check("prox_norms");
  Tensor out = new_doubles(phi, {phi.size(0), 2});
  dispatch(phi, [&](auto zero) {
    cpu::prox_norms(tensors.args<decltype(zero)>(), out.mutable_data_ptr<double>(), threads(),
                    parallel_for);
  });
  return out;
}

Tensor row_dot(const Tensor& a, const Tensor& b) {
  Checker("row_dot", "a", a).same("b", b);
  Tensor out = new_doubles(a, {a.size(0)});
  dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    cpu::row_dot(a.const_data_ptr<T>(), b.const_data_ptr<T>(), out.mutable_data_ptr<double>(),
                 a.size(0), a.size(1), threads(), parallel_for);
  });
  return out;
}

}  // namespace
}  // namespace imaml

STABLE_TORCH_LIBRARY_IMPL(imaml, CPU, m) {
  m.impl("cg_step_", TORCH_BOX(&imaml::cg_step_));
  m.impl("prox_gd_", TORCH_BOX(&imaml::prox_gd_));
  m.impl("prox_adam_", TORCH_BOX(&imaml::prox_adam_));
  m.impl("prox_norms", TORCH_BOX(&imaml::prox_norms));
  m.impl("row_dot", TORCH_BOX(&imaml::row_dot));
}
