// Checks of the operators' arguments, and the kernels' arguments made from them. Shared by the CPU
// and the CUDA side; an error is a RuntimeError that names the operator and what it got.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/formulas.h"

namespace imaml {

using std::int64_t;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t k = 0; k < t.dim(); ++k) text << (k ? ", " : "") << t.size(k);
  text << "]";
  return text.str();
}

// Names an operator's arguments while it checks them against the first, which must be [B, D].
class Checker {
 public:
  Checker(const char* op, const char* name, const Tensor& first)
      : op_(op), first_name_(name), first_(first) {
    if (first.dim() != 2) fail(op, name, " must be [B, D], got ", shape(first));
    if (first.scalar_type() != ScalarType::Float && first.scalar_type() != ScalarType::Double)
      fail(op, name, " must be float32 or float64, got ", toString(first.scalar_type()));
    contiguous(name, first);
  }

  int64_t rows() const { return first_.size(0); }
  int64_t dim() const { return first_.size(1); }

  const Checker& same(const char* name, const Tensor& t) const {
    if (t.dim() != 2 || t.size(0) != rows() || t.size(1) != dim())
      fail(op_, name, " must have ", first_name_, "'s shape ", shape(first_), ", got ", shape(t));
    return like(name, t);
  }

  const Checker& vector(const char* name, const Tensor& t) const {
    if (t.dim() != 1 || t.size(0) != dim())
      fail(op_, name, " must be [", dim(), "], got ", shape(t));
    return like(name, t);
  }

  // [1]: a scalar; [D]: a diagonal.
  const Checker& scalar_or_vector(const char* name, const Tensor& t) const {
    if (t.dim() != 1 || (t.size(0) != 1 && t.size(0) != dim()))
      fail(op_, name, " must be [1] or [", dim(), "], got ", shape(t));
    return like(name, t);
  }

  const Checker& per_row(const char* name, const Tensor& t, ScalarType type) const {
    if (t.dim() != 1 || t.size(0) != rows())
      fail(op_, name, " must be [", rows(), "], got ", shape(t));
    if (t.scalar_type() != type)
      fail(op_, name, " must be ", toString(type), ", got ", toString(t.scalar_type()));
    return placed(name, t);
  }

 private:
  const Checker& like(const char* name, const Tensor& t) const {
    if (t.scalar_type() != first_.scalar_type())
      fail(op_, name, " must be ", toString(first_.scalar_type()), " as ", first_name_, ", got ",
           toString(t.scalar_type()));
    return placed(name, t);
  }

  const Checker& placed(const char* name, const Tensor& t) const {
    if (t.device() != first_.device()) fail(op_, name, " must be on the device of ", first_name_);
    contiguous(name, t);
    return *this;
  }

  void contiguous(const char* name, const Tensor& t) const {
    if (!t.is_contiguous()) fail(op_, name, " must be contiguous");
  }

  const char* op_;
  const char* first_name_;
  const Tensor& first_;
};

// An operand in memory, which has been checked to be contiguous; nowhere if it is absent or empty.
struct Extent {
  const char* name;
  const char* begin = nullptr;
  const char* end = nullptr;

  Extent(const char* name, const Tensor& t)
      : name(name),
        begin(static_cast<const char*>(t.const_data_ptr())),
        end(begin + t.numel() * (t.scalar_type() == ScalarType::Double ? 8 : 4)) {}
  Extent(const char* name, const std::optional<Tensor>& t)
      : Extent(t ? Extent(name, *t) : Extent(name)) {}

  bool overlaps(const Extent& other) const {
    const bool empty = begin == end || other.begin == other.end;
    return !empty && std::less<>{}(begin, other.end) && std::less<>{}(other.begin, end);
  }

 private:
  explicit Extent(const char* name) : name(name) {}
};

// What a kernel writes must lie apart from every other operand: it reads and writes in no order
// that a caller could rely on.
inline void check_apart(const char* op, std::initializer_list<Extent> written,
                        std::initializer_list<Extent> read) {
  const auto refuse = [&](const Extent& a, const Extent& b) {
    if (a.overlaps(b)) fail(op, a.name, " is written and must not share memory with ", b.name);
  };
  for (const Extent* one = written.begin(); one != written.end(); ++one) {
    for (const Extent* other = one + 1; other != written.end(); ++other) refuse(*one, *other);
    for (const Extent& other : read) refuse(*one, other);
  }
}

// Calls body(float{}) or body(double{}). The type has been checked.
template <typename Body>
void dispatch(const Tensor& t, const Body& body) {
  if (t.scalar_type() == ScalarType::Float)
    body(float{});
  else
    body(double{});
}

inline int64_t stride_of(const Tensor& lam) { return lam.size(0) == 1 ? 0 : 1; }

// The arguments of cg_step_, in the order of its schema.
struct CgTensors {
  Tensor &x, &r, &p;
  const Tensor &hp, &lam;
  double damping;
  const std::optional<Tensor>& inverse;
  Tensor& rr;
  const std::optional<Tensor>& rz;
  const Tensor& tol2;
  Tensor &status, &steps, &curvature, &beta;

  void check() const {
    const Checker checker("cg_step_", "x", x);
    checker.same("r", r)
        .same("p", p)
        .same("hp", hp)
        .scalar_or_vector("lam", lam)
        .per_row("rr", rr, ScalarType::Double)
        .per_row("tol2", tol2, ScalarType::Double)
        .per_row("status", status, ScalarType::Int)
        .per_row("steps", steps, ScalarType::Int)
        .per_row("curvature", curvature, ScalarType::Double)
        .per_row("beta", beta, ScalarType::Double);
    if (inverse.has_value() != rz.has_value())
      fail("cg_step_", "a preconditioner needs both inverse and rz, got ",
           inverse ? "inverse" : "rz", " alone");
    if (inverse) checker.same("inverse", *inverse).per_row("rz", *rz, ScalarType::Double);
    check_apart("cg_step_",
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
  }

  template <typename T>
  CgArgs<T> args() const {
    CgArgs<T> a{};
    a.x = x.mutable_data_ptr<T>();
    a.r = r.mutable_data_ptr<T>();
    a.p = p.mutable_data_ptr<T>();
    a.hp = hp.const_data_ptr<T>();
    a.lam = lam.const_data_ptr<T>();
    a.lam_stride = stride_of(lam);
    a.damping = static_cast<T>(damping);
    a.inverse = inverse ? inverse->const_data_ptr<T>() : nullptr;
    a.rr = rr.mutable_data_ptr<double>();
    a.rz = rz ? rz->mutable_data_ptr<double>() : nullptr;
    a.tol2 = tol2.const_data_ptr<double>();
    a.status = status.mutable_data_ptr<std::int32_t>();
    a.steps = steps.mutable_data_ptr<std::int32_t>();
    a.curvature = curvature.mutable_data_ptr<double>();
    a.beta = beta.mutable_data_ptr<double>();
    a.rows = x.size(0);
    a.dim = x.size(1);
    return a;
  }
};

// What the proximal steps and prox_norms share. `phi` is written by the steps alone.
struct ProxTensors {
  const Tensor &phi, &grad, &theta, &lam;
  std::optional<Tensor> status = std::nullopt;

  Checker check(const char* op) const {
    Checker checker(op, "phi", phi);
    checker.same("grad", grad).vector("theta", theta).scalar_or_vector("lam", lam);
    if (status) checker.per_row("status", *status, ScalarType::Int);
    return checker;
  }

  void check_apart_from(const char* op, std::initializer_list<Extent> written) const {
    check_apart(op, written, {{"grad", grad}, {"theta", theta}, {"lam", lam}, {"status", status}});
  }

  template <typename T>
  ProxArgs<T> args() const {
    ProxArgs<T> a{};
    a.phi = const_cast<T*>(phi.const_data_ptr<T>());
    a.grad = grad.const_data_ptr<T>();
    a.theta = theta.const_data_ptr<T>();
    a.lam = lam.const_data_ptr<T>();
    a.lam_stride = stride_of(lam);
    a.status = status ? status->const_data_ptr<std::int32_t>() : nullptr;
    a.rows = phi.size(0);
    a.dim = phi.size(1);
    return a;
  }
};

// The steps: what they share, and their rule's own arguments.
struct DescentTensors {
  static constexpr const char* kName = "prox_gd_";
  ProxTensors prox;
  const std::optional<Tensor>& velocity;
  double lr, momentum;
  bool nesterov;

  void check() const {
    const Checker checker = prox.check(kName);
    if (velocity) checker.same("velocity", *velocity);
    if (!velocity && momentum != 0) fail(kName, "momentum needs a velocity buffer");
    prox.check_apart_from(kName, {{"phi", prox.phi}, {"velocity", velocity}});
  }

  template <typename T>
  Descent<T> rule() const {
    return {velocity ? velocity->mutable_data_ptr<T>() : nullptr, static_cast<T>(lr),
            static_cast<T>(momentum), nesterov};
  }
};

struct AdamTensors {
  static constexpr const char* kName = "prox_adam_";
  ProxTensors prox;
  Tensor &first_moment, &second_moment;
  AdamSettings settings;

  void check() const {
    prox.check(kName).same("first_moment", first_moment).same("second_moment", second_moment);
    for (const double beta : {settings.beta1, settings.beta2})
      if (!(beta >= 0 && beta < 1)) fail(kName, "beta1 and beta2 must be in [0, 1), got ", beta);
    if (settings.step < 1) fail(kName, "step counts from 1, got ", settings.step);
    prox.check_apart_from(
        kName,
        {{"phi", prox.phi}, {"first_moment", first_moment}, {"second_moment", second_moment}});
  }

  template <typename T>
  Adam<T> rule() const {
    return {first_moment.mutable_data_ptr<T>(), second_moment.mutable_data_ptr<T>(), settings};
  }
};

// An uninitialised result. Why it cannot be had torch's own error does not tell.
inline Tensor new_result(const char* op, const Tensor& like, std::initializer_list<int64_t> sizes) {
  try {
    return torch::stable::new_empty(like, sizes);
  } catch (const std::exception&) {
    std::ostringstream text;
    for (const int64_t size : sizes) text << (text.tellp() > 0 ? ", " : "") << size;
    fail(op, "cannot allocate a result of shape [", text.str(), "]");
  }
}

inline Tensor new_doubles(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}

}  // namespace imaml
