// The arithmetic of one row or one element, shared by the CPU and the CUDA kernels.
//
// Torch-free and CUDA-free. All decisions about a task (its step length, status and direction) are
// made here, in float64 for either element type.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define IMAML_INLINE __host__ __device__ __forceinline__
#else
#define IMAML_INLINE inline __attribute__((always_inline))
#endif

namespace imaml {

// The same numbers as imaml_ext.Status in Python, which a test compares.
enum Status : std::int32_t {
  kRunning = 0,
  kConverged = 1,
  kMaxIter = 2,
  kNegativeCurvature = 3,
  kNonfinite = 4,
};

// One CG iteration on `rows` independent systems (H_i + diag(lam) + damping I) x_i = b_i, with
// hp = H p already computed. All buffers are contiguous: [rows, dim] down to `inverse`,
// except lam; then [rows].
template <typename T>
struct CgArgs {
  T* x;
  T* r;
  T* p;
  const T* hp;
  const T* lam;             // [1] or [dim]
  std::int64_t lam_stride;  // 0 for [1], 1 for [dim]
  T damping;
  const T* inverse;    // M^-1, the inverse of a positive diagonal preconditioner; null: none
  double* rr;          // r.r, by the recurrence
  double* rz;          // r.z with z = M^-1 r, by the recurrence; null without a preconditioner
  const double* tol2;  // squared absolute tolerance
  std::int32_t* status;
  std::int32_t* steps;
  double* curvature;  // out: p.Ap / r.z, the inverse step length (0 for a frozen row)
  double* beta;       // out: new r.z / old r.z (0 for a frozen row)
  std::int64_t rows;
  std::int64_t dim;
};

// The gradient g = grad + lam (phi - theta) of `rows` proximal objectives.
template <typename T>
struct ProxArgs {
  T* phi;          // [rows, dim]
  const T* grad;   // [rows, dim]
  const T* theta;  // [dim]
  const T* lam;    // [1] or [dim]
  std::int64_t lam_stride;
  const std::int32_t* status;  // [rows] or null; a step skips rows that are not kRunning
  std::int64_t rows;
  std::int64_t dim;
};

template <typename T>
inline constexpr double kEpsilon = std::numeric_limits<T>::epsilon();

IMAML_INLINE bool is_finite(double value) { return value - value == 0.0; }

// ---- conjugate gradient ----------------------------------------------------------------------

struct CgSums {
  double pap = 0;   // p.Ap
  double pp = 0;    // p.p
  double apap = 0;  // Ap.Ap

  IMAML_INLINE void operator+=(const CgSums& part) {
    pap += part.pap;
    pp += part.pp;
    apap += part.apap;
  }
};

// Of the updated residual. Without a preconditioner z is r, and the two are equal.
struct CgNorms {
  double rr = 0;  // r.r
  double rz = 0;  // r.z, z = M^-1 r

  IMAML_INLINE void operator+=(const CgNorms& part) {
    rr += part.rr;
    rz += part.rz;
  }
};

enum CgAction : std::int32_t {
  kFreeze,        // leave the row unchanged
  kAdvance,       // x += alpha p, r -= alpha Ap
  kProximalStep,  // x += r / lam: the solution step of lam alone, without H
  kClear,         // x = 0: the row is not finite
};

struct CgStep {
  CgAction action;
  std::int32_t status;
  double alpha;
};

// r.z at the start of the iteration.
template <typename T>
IMAML_INLINE double cg_old_rz(const CgArgs<T>& a, std::int64_t row) {
  return a.rz == nullptr ? a.rr[row] : a.rz[row];
}

// The step of a running row, given p.Ap and r.z. T is the element type.
//
// Curvature counts as not positive when p.Ap <= epsilon |p| |Ap|. Unlike an absolute threshold this
// does not depend on the scale of A, and a positive definite A passes unless its condition number
// is near 4 / epsilon^2 (Kantorovich's inequality).
template <typename T>
IMAML_INLINE CgStep cg_step_length(const CgSums& s, double rz, std::int32_t steps) {
  if (!is_finite(s.pap) || !is_finite(s.apap)) return {kClear, kNonfinite, 0.0};
  if (s.pap <= kEpsilon<T> * std::sqrt(s.pp) * std::sqrt(s.apap))
    return {steps == 0 ? kProximalStep : kFreeze, kNegativeCurvature, 0.0};
  const double alpha = rz / s.pap;
  if (!is_finite(alpha)) return {kClear, kNonfinite, 0.0};
  return {kAdvance, kRunning, alpha};
}

struct CgDirection {
  CgAction action;  // kAdvance: p = z + beta p. kClear: x = 0. Otherwise nothing.
  std::int32_t status;
  double beta;
};

// The row's next direction. Convergence is decided by the residual, not by the preconditioned one;
// the row continues only while M^-1 is positive and finite on it.
IMAML_INLINE CgDirection cg_direction(const CgStep& step, const CgNorms& norms, double rz_old,
                                      double tol2) {
  if (step.action == kFreeze) return {kFreeze, step.status, 0.0};
  if (step.action == kClear || !is_finite(norms.rr)) return {kClear, kNonfinite, 0.0};
  if (step.action == kProximalStep) return {kFreeze, step.status, 0.0};
  const double beta = norms.rz / rz_old;
  if (norms.rr <= tol2) return {kFreeze, kConverged, beta};
  if (!is_finite(norms.rz) || (norms.rz <= 0 && norms.rr > 0)) return {kClear, kNonfinite, 0.0};
  return {kAdvance, kRunning, beta};
}

// Writes the row's entries. `rz_old` is cg_old_rz at the start of the iteration.
template <typename T>
IMAML_INLINE void cg_record(const CgArgs<T>& a, std::int64_t row, const CgSums& s,
                            const CgStep& step, const CgDirection& next, const CgNorms& norms,
                            double rz_old) {
  const bool measured = a.status[row] == kRunning;
  a.curvature[row] = measured ? s.pap / rz_old : 0.0;
  a.beta[row] = next.beta;
  if (step.action == kAdvance || next.action == kClear) {
    // The residual of a cleared row is unknown.
    const CgNorms known = next.action == kClear ? CgNorms{NAN, NAN} : norms;
    a.rr[row] = known.rr;
    if (a.rz != nullptr) a.rz[row] = known.rz;
  }
  if (step.action == kAdvance && next.action != kClear) a.steps[row] += 1;
  a.status[row] = next.status;
}

template <typename T>
IMAML_INLINE T cg_operator(T hp, T lam, T damping, T p) {
  return hp + (lam + damping) * p;
}

// Second pass, one element: updates x and returns the new r.
template <typename T>
IMAML_INLINE T cg_take_step(const CgStep& step, T alpha, T p, T ap, T lam, T& x, T r) {
  if (step.action == kAdvance) {
    x += alpha * p;
    return r - alpha * ap;
  }
  if (step.action == kProximalStep && lam > T(0)) x += r / lam;
  if (step.action == kClear) x = T(0);
  return r;
}

// Element `at` of z. In beta p + z a compiler may contract either product into the sum, but only
// contracting beta p makes M = I give the same bits as no preconditioner. The intrinsics enforce it
// for nvcc, and GCC contracts the first product, so beta p must come first.
template <bool kPreconditioned, typename T>
IMAML_INLINE T cg_z(const T* inverse, std::int64_t at, T r) {
  if constexpr (!kPreconditioned) {
    return r;
  } else {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == sizeof(double))
      return __dmul_rn(inverse[at], r);
    else
      return __fmul_rn(inverse[at], r);
#else
    return inverse[at] * r;
#endif
  }
}

// An element's term of the new r.z, or of r.r given z = r. NaN if x is not finite, so that one sum
// detects both.
template <typename T>
IMAML_INLINE double cg_residual(T r, T z, T x) {
  return static_cast<double>(r) * static_cast<double>(z) + static_cast<double>(x - x);
}

// ---- proximal steps --------------------------------------------------------------------------

template <typename T>
IMAML_INLINE T prox_gradient(T phi, T grad, T theta, T lam) {
  return grad + lam * (phi - theta);
}

template <typename T>
IMAML_INLINE bool prox_is_running(const ProxArgs<T>& a, std::int64_t row) {
  return a.status == nullptr || a.status[row] == kRunning;
}

// An update rule: phi[at] -= rule(g, at) for the gradient g. It updates its buffers, [rows, dim].

// Gradient descent, with (Nesterov) momentum as torch.optim.SGD defines it.
template <typename T>
struct Descent {
  T* __restrict velocity;  // null: no momentum
  T lr;
  T momentum;
  bool nesterov;

  IMAML_INLINE T operator()(T g, std::int64_t at) const {
    if (velocity == nullptr) return lr * g;
    const T v = velocity[at] = momentum * velocity[at] + g;
    return lr * (nesterov ? g + momentum * v : v);
  }
};

struct AdamSettings {
  double lr, beta1, beta2, eps;
  std::int64_t step;  // the first is 1
};

// Adam as torch.optim.Adam defines it:
//   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2;
//   phi -= lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps).
template <typename T>
struct Adam {
  T* __restrict m;
  T* __restrict v;
  T beta1, beta2, eps;
  // Computed in float64, then rounded:
  T complement1, complement2;  // 1 - beta1, 1 - beta2
  T rate;                      // lr / (1 - beta1^step)
  T scale;                     // 1 / sqrt(1 - beta2^step)

  Adam(T* m, T* v, const AdamSettings& s)
      : m(m),
        v(v),
        beta1(static_cast<T>(s.beta1)),
        beta2(static_cast<T>(s.beta2)),
        eps(static_cast<T>(s.eps)),
        complement1(static_cast<T>(1 - s.beta1)),
        complement2(static_cast<T>(1 - s.beta2)),
        rate(static_cast<T>(s.lr / (1 - std::pow(s.beta1, static_cast<double>(s.step))))),
        scale(static_cast<T>(1 / std::sqrt(1 - std::pow(s.beta2, static_cast<double>(s.step))))) {}

  IMAML_INLINE T operator()(T g, std::int64_t at) const {
    const T mean = m[at] = beta1 * m[at] + complement1 * g;
    const T square = v[at] = beta2 * v[at] + complement2 * (g * g);
    return rate * mean / (std::sqrt(square) * scale + eps);
  }
};

// ---- the gradient of a meta-parameter --------------------------------------------------------

// Sums over the rows of w x and of w x (phi - theta), elementwise: [2, dim]. A row's x counts as 0
// unless `use` is positive, and its displacement phi - theta unless `use` is 2.
template <typename T>
struct PullBackArgs {
  const T* x;               // [rows, dim]
  const T* phi;             // [rows, dim]
  const T* theta;           // [dim]
  const T* weight;          // [1]: w
  const std::int32_t* use;  // [rows]
  T* sums;                  // [2, dim]
  std::int64_t rows, dim;
};

// The terms of an element of a row. The weight is applied before the sum, which may overflow where
// the mean does not; one that is NaN makes every sum NaN.
template <typename T>
struct PullBackTerms {
  double x, product;

  IMAML_INLINE PullBackTerms(std::int32_t use, T x, T phi, T theta, T weight) {
    const T weighted = (use > 0 ? x : T(0)) * weight;
    const T displacement = use > 1 ? phi - theta : T(0);
    this->x = static_cast<double>(weighted);
    product = static_cast<double>(weighted) * static_cast<double>(displacement);
  }
};

}  // namespace imaml
