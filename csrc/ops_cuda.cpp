// The operators on CUDA: check, choose the device and the current stream, launch, check the launch.
#include <torch/csrc/stable/library.h>

#include "cuda_device.h"

namespace imaml {
namespace {

void cg_step_(Tensor x, Tensor r, Tensor p, const Tensor& hp, const Tensor& lam, double damping,
              std::optional<Tensor> inverse, Tensor rr, std::optional<Tensor> rz,
              const Tensor& tol2, Tensor status, Tensor steps, Tensor curvature, Tensor beta) {
  const CgTensors tensors{x,  r,  p,    hp,     lam,   damping,   inverse,
                          rr, rz, tol2, status, steps, curvature, beta};
  tensors.check();
  const Device device("cg_step_", x);
  dispatch(x, [&](auto zero) {
    const auto args = tensors.args<decltype(zero)>();
    Tensor workspace = new_doubles(x, {cuda::cg_step_workspace(args)});
    device.check(cuda::cg_step_on(args, workspace.mutable_data_ptr<double>(), device.stream()));
  });
}

template <typename StepTensors>
void prox_step(const StepTensors& tensors) {
  tensors.check();
  const Device device(StepTensors::kName, tensors.prox.phi);
  dispatch(tensors.prox.phi, [&](auto zero) {
    using T = decltype(zero);
    device.check(cuda::prox_step_on(tensors.prox.template args<T>(), tensors.template rule<T>(),
                                    device.stream()));
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
  const Device device("prox_norms", phi);
  Tensor out = new_doubles(phi, {phi.size(0), 2});
  Tensor workspace = new_doubles(phi, {cuda::sums_workspace(phi.size(0), phi.size(1), 2)});
  dispatch(phi, [&](auto zero) {
    device.check(cuda::prox_norms_on(tensors.args<decltype(zero)>(), out.mutable_data_ptr<double>(),
                                     workspace.mutable_data_ptr<double>(), device.stream()));
  });
  return out;
}

Tensor row_dot(const Tensor& a, const Tensor& b) {
  Checker("row_dot", "a", a).same("b", b);
  const Device device("row_dot", a);
  Tensor out = new_doubles(a, {a.size(0)});
  Tensor workspace = new_doubles(a, {cuda::sums_workspace(a.size(0), a.size(1), 1)});
  dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    device.check(cuda::row_dot_on(
        a.const_data_ptr<T>(), b.const_data_ptr<T>(), out.mutable_data_ptr<double>(),
        workspace.mutable_data_ptr<double>(), a.size(0), a.size(1), device.stream()));
  });
  return out;
}

}  // namespace
}  // namespace imaml

STABLE_TORCH_LIBRARY_IMPL(imaml, CUDA, m) {
  m.impl("cg_step_", TORCH_BOX(&imaml::cg_step_));
  m.impl("prox_gd_", TORCH_BOX(&imaml::prox_gd_));
  m.impl("prox_adam_", TORCH_BOX(&imaml::prox_adam_));
  m.impl("prox_norms", TORCH_BOX(&imaml::prox_norms));
  m.impl("row_dot", TORCH_BOX(&imaml::row_dot));
}
