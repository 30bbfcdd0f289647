// The operators on rows, for either device. `Device` (Cpu in cpu.cpp, Cuda in cuda.cpp) launches
// the kernels; everything else is the same.
#pragma once
#include <torch/csrc/stable/library.h>

#include "bindings/checks.h"
#include "formulas.h"

namespace imaml {

inline int64_t stride_of(const Tensor& lam) { return lam.size(0) == 1 ? 0 : 1; }

template <typename Device>
void cg_step_(Tensor x, Tensor r, Tensor p, const Tensor& hp, const Tensor& lam, double damping,
              std::optional<Tensor> inverse, Tensor rr, std::optional<Tensor> rz,
              const Tensor& tol2, Tensor status, Tensor steps, Tensor curvature, Tensor beta) {
  constexpr const char* kName = "cg_step_";
  const Checker checker(kName, "x", x, 2, Empty::kAllowed);
  const int64_t rows = x.size(0), dim = x.size(1);
  checker.operand("r", r, {rows, dim})
      .operand("p", p, {rows, dim})
      .operand("hp", hp, {rows, dim})
      .lam(lam, dim)
      .typed("rr", rr, {rows}, ScalarType::Double)
      .typed("tol2", tol2, {rows}, ScalarType::Double)
      .typed("status", status, {rows}, ScalarType::Int)
      .typed("steps", steps, {rows}, ScalarType::Int)
      .typed("curvature", curvature, {rows}, ScalarType::Double)
      .typed("beta", beta, {rows}, ScalarType::Double);
  if (inverse.has_value() != rz.has_value())
    fail(kName, "a preconditioner needs both inverse and rz, got ", inverse ? "inverse" : "rz",
         " alone");
  if (inverse)
    checker.operand("inverse", *inverse, {rows, dim}).typed("rz", *rz, {rows}, ScalarType::Double);
  check_no_alias(kName,
                 {{"x", x},
                  {"r", r},
                  {"p", p},
                  {"rr", rr},
                  {"rz", rz},
                  {"status", status},
                  {"steps", steps},
                  {"curvature", curvature},
                  {"beta", beta}},
                 {{"hp", hp}, {"lam", lam}, {"inverse", inverse}, {"tol2", tol2}});
  const Device device(kName, x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    device.cg_step(CgArgs<T>{.x = x.mutable_data_ptr<T>(),
                             .r = r.mutable_data_ptr<T>(),
                             .p = p.mutable_data_ptr<T>(),
                             .hp = hp.const_data_ptr<T>(),
                             .lam = lam.const_data_ptr<T>(),
                             .lam_stride = stride_of(lam),
                             .damping = static_cast<T>(damping),
                             .inverse = inverse ? inverse->const_data_ptr<T>() : nullptr,
                             .rr = rr.mutable_data_ptr<double>(),
                             .rz = rz ? rz->mutable_data_ptr<double>() : nullptr,
                             .tol2 = tol2.const_data_ptr<double>(),
                             .status = status.mutable_data_ptr<std::int32_t>(),
                             .steps = steps.mutable_data_ptr<std::int32_t>(),
                             .curvature = curvature.mutable_data_ptr<double>(),
                             .beta = beta.mutable_data_ptr<double>(),
                             .rows = rows,
                             .dim = dim});
  });
}

// The arguments that the proximal operators share.
struct ProxTensors {
  const char* op;
  const Tensor &phi, &grad, &theta, &lam;
  std::optional<Tensor> status = std::nullopt;

  Checker check() const {
    const Checker checker(op, "phi", phi, 2, Empty::kAllowed);
    const int64_t rows = phi.size(0), dim = phi.size(1);
    checker.operand("grad", grad, {rows, dim}).operand("theta", theta, {dim}).lam(lam, dim);
    if (status) checker.typed("status", *status, {rows}, ScalarType::Int);
    return checker;
  }

  void check_no_alias(std::initializer_list<MemoryRange> written) const {
    imaml::check_no_alias(op, written,
                          {{"grad", grad}, {"theta", theta}, {"lam", lam}, {"status", status}});
  }

  template <typename T>
  ProxArgs<T> args() const {
    return {.phi = const_cast<T*>(phi.const_data_ptr<T>()),  // prox_norms only reads it
            .grad = grad.const_data_ptr<T>(),
            .theta = theta.const_data_ptr<T>(),
            .lam = lam.const_data_ptr<T>(),
            .lam_stride = stride_of(lam),
            .status = status ? status->const_data_ptr<std::int32_t>() : nullptr,
            .rows = phi.size(0),
            .dim = phi.size(1)};
  }
};

template <typename Device>
void prox_gd_(Tensor phi, std::optional<Tensor> velocity, const Tensor& grad, const Tensor& theta,
              const Tensor& lam, double lr, double momentum, bool nesterov,
              std::optional<Tensor> status) {
  const ProxTensors prox{"prox_gd_", phi, grad, theta, lam, status};
  const Checker checker = prox.check();
  if (velocity) checker.operand("velocity", *velocity, {phi.size(0), phi.size(1)});
  if (!velocity && momentum != 0) fail(prox.op, "momentum needs a velocity buffer");
  prox.check_no_alias({{"phi", phi}, {"velocity", velocity}});
  const Device device(prox.op, phi);
  dispatch(phi, [&](auto zero) {
    using T = decltype(zero);
    device.prox_step(prox.args<T>(),
                     Descent<T>{velocity ? velocity->mutable_data_ptr<T>() : nullptr,
                                static_cast<T>(lr), static_cast<T>(momentum), nesterov});
  });
}

template <typename Device>
void prox_adam_(Tensor phi, Tensor first_moment, Tensor second_moment, const Tensor& grad,
                const Tensor& theta, const Tensor& lam, double lr, double beta1, double beta2,
                double eps, int64_t step, std::optional<Tensor> status) {
  const ProxTensors prox{"prox_adam_", phi, grad, theta, lam, status};
  const Checker checker = prox.check();
  const int64_t rows = phi.size(0), dim = phi.size(1);
  checker.operand("first_moment", first_moment, {rows, dim})
      .operand("second_moment", second_moment, {rows, dim});
  for (const double beta : {beta1, beta2})
    if (!(beta >= 0 && beta < 1)) fail(prox.op, "beta1 and beta2 must be in [0, 1), got ", beta);
  if (step < 1) fail(prox.op, "step must be at least 1, got ", step);
  prox.check_no_alias(
      {{"phi", phi}, {"first_moment", first_moment}, {"second_moment", second_moment}});
  const Device device(prox.op, phi);
  dispatch(phi, [&](auto zero) {
    using T = decltype(zero);
    device.prox_step(prox.args<T>(),
                     Adam<T>(first_moment.mutable_data_ptr<T>(),
                             second_moment.mutable_data_ptr<T>(), {lr, beta1, beta2, eps, step}));
  });
}

template <typename Device>
Tensor prox_norms(const Tensor& phi, const Tensor& grad, const Tensor& theta, const Tensor& lam) {
  const ProxTensors prox{"prox_norms", phi, grad, theta, lam};
  prox.check();
  const Device device(prox.op, phi);
  Tensor out = new_doubles(phi, {phi.size(0), 2});
  dispatch(phi, [&](auto zero) {
    device.prox_norms(prox.args<decltype(zero)>(), out.mutable_data_ptr<double>());
  });
  return out;
}

template <typename Device>
Tensor row_dot(const Tensor& a, const Tensor& b) {
  constexpr const char* kName = "row_dot";
  const Checker checker(kName, "a", a, 2, Empty::kAllowed);
  const int64_t rows = a.size(0), dim = a.size(1);
  checker.operand("b", b, {rows, dim});
  const Device device(kName, a);
  Tensor out = new_doubles(a, {rows});
  dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    device.row_dot(a.const_data_ptr<T>(), b.const_data_ptr<T>(), out.mutable_data_ptr<double>(),
                   rows, dim);
  });
  return out;
}

template <typename Device>
Tensor pull_back(const Tensor& x, const Tensor& phi, const Tensor& theta, const Tensor& weight,
                 const Tensor& use) {
  constexpr const char* kName = "pull_back";
  const Checker checker(kName, "x", x, 2, Empty::kAllowed);
  const int64_t rows = x.size(0), dim = x.size(1);
  checker.operand("phi", phi, {rows, dim})
      .operand("theta", theta, {dim})
      .operand("weight", weight, {1})
      .typed("use", use, {rows}, ScalarType::Int);
  Tensor sums = new_result(kName, x, {2, dim});
  const Device device(kName, x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    device.pull_back(PullBackArgs<T>{.x = x.const_data_ptr<T>(),
                                     .phi = phi.const_data_ptr<T>(),
                                     .theta = theta.const_data_ptr<T>(),
                                     .weight = weight.const_data_ptr<T>(),
                                     .use = use.const_data_ptr<std::int32_t>(),
                                     .sums = sums.mutable_data_ptr<T>(),
                                     .rows = rows,
                                     .dim = dim});
  });
  return sums;
}

template <typename Device, typename Library>
void register_rows(Library& m) {
  m.impl("cg_step_", TORCH_BOX(&cg_step_<Device>));
  m.impl("prox_gd_", TORCH_BOX(&prox_gd_<Device>));
  m.impl("prox_adam_", TORCH_BOX(&prox_adam_<Device>));
  m.impl("prox_norms", TORCH_BOX(&prox_norms<Device>));
  m.impl("row_dot", TORCH_BOX(&row_dot<Device>));
  m.impl("pull_back", TORCH_BOX(&pull_back<Device>));
}

}  // namespace imaml
