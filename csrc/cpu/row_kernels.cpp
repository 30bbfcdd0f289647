// Memory traffic of a CG iteration, per element:
//   cg_curvature         reads p, hp;
//   cg_update            reads p, hp, x, r and writes x, r;
//   cg_update_direction  reads r, p and writes p.
// rows.h runs the three on one row before the next, so that each finds in cache what the previous
// one read: 7 accesses reach memory where a row's four vectors fit in cache, 11 where they do not.
// A preconditioner adds a read of its diagonal to the last two.
#include "cpu/row_kernels.h"

#include "cpu/isa.h"

namespace imaml::cpu {
namespace {

constexpr int kLanes = 16;

// Calls element(i, lane) for i in [begin, end), lane = (i - begin) % kLanes. The constant inner
// bounds let the compiler vectorise over lanes.
template <typename Element>
IMAML_INLINE void for_lanes(int64_t begin, int64_t end, const Element& element) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) element(i + lane, lane);
  for (int lane = 0; i + lane < end; ++lane) element(i + lane, lane);
}

IMAML_INLINE double sum_lanes(const double* lanes) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

template <typename T>
IMAML_INLINE double square(T value) {
  return static_cast<double>(value) * static_cast<double>(value);
}

// kDiagonal and kPreconditioned are known at compile time: lam[i * stride] with a run-time stride
// would be a gather, and a pointer that may be null a branch.
template <bool kDiagonal, typename T>
IMAML_INLINE CgSums curvature(const CgArgs<T>& a, int64_t row, int64_t begin, int64_t end) {
  const T* __restrict p = a.p + row * a.dim;
  const T* __restrict hp = a.hp + row * a.dim;
  const T* __restrict lam = a.lam;
  const T damping = a.damping, lam0 = lam[0];
  double pap[kLanes] = {}, pp[kLanes] = {}, apap[kLanes] = {};
  for_lanes(begin, end, [&](int64_t i, int lane) {
    const T ap = cg_operator(hp[i], kDiagonal ? lam[i] : lam0, damping, p[i]);
    pap[lane] += static_cast<double>(p[i]) * static_cast<double>(ap);
    pp[lane] += square(p[i]);
    apap[lane] += square(ap);
  });
  return {sum_lanes(pap), sum_lanes(pp), sum_lanes(apap)};
}

template <bool kDiagonal, bool kPreconditioned, typename T>
IMAML_INLINE CgNorms update(const CgArgs<T>& a, const CgStep& step, int64_t row, int64_t begin,
                            int64_t end) {
  const T* __restrict p = a.p + row * a.dim;
  const T* __restrict hp = a.hp + row * a.dim;
  T* __restrict x = a.x + row * a.dim;
  T* __restrict r = a.r + row * a.dim;
  const T* __restrict inverse = kPreconditioned ? a.inverse + row * a.dim : nullptr;
  const T* __restrict lam = a.lam;
  const T damping = a.damping, lam0 = lam[0], alpha = static_cast<T>(step.alpha);
  double rr[kLanes] = {}, rz[kLanes] = {};
  const auto move = [&](const CgStep& how, int64_t i, int lane) {
    const T lam_i = kDiagonal ? lam[i] : lam0;
    r[i] =
        cg_take_step(how, alpha, p[i], cg_operator(hp[i], lam_i, damping, p[i]), lam_i, x[i], r[i]);
    rr[lane] += cg_residual(r[i], r[i], x[i]);
    if (kPreconditioned) rz[lane] += cg_residual(r[i], cg_z<true>(inverse, i, r[i]), x[i]);
  };
  // The common action is a constant, so that its loop has no branch and vectorises.
  if (step.action == kAdvance)
    for_lanes(begin, end, [&](int64_t i, int lane) { move({kAdvance, kRunning, 0.0}, i, lane); });
  else
    for_lanes(begin, end, [&](int64_t i, int lane) { move(step, i, lane); });
  const double total = sum_lanes(rr);
  return {total, kPreconditioned ? sum_lanes(rz) : total};
}

template <bool kPreconditioned, typename T>
IMAML_INLINE void update_direction(const CgArgs<T>& a, const CgDirection& next, int64_t row,
                                   int64_t begin, int64_t end) {
  T* __restrict p = a.p + row * a.dim;
  T* __restrict x = a.x + row * a.dim;
  const T* __restrict r = a.r + row * a.dim;
  const T* __restrict inverse = kPreconditioned ? a.inverse + row * a.dim : nullptr;
  const T beta = static_cast<T>(next.beta);
  if (next.action == kAdvance)
    for (int64_t i = begin; i < end; ++i)
      p[i] = beta * p[i] + cg_z<kPreconditioned>(inverse, i, r[i]);
  else if (next.action == kClear)
    for (int64_t i = begin; i < end; ++i) x[i] = T(0);
}

// `rule` is passed by value: stores to its buffers cannot alias it, so the loop vectorises.
template <bool kDiagonal, typename T, typename Rule>
IMAML_INLINE void step(const ProxArgs<T>& a, const Rule rule, int64_t row, int64_t begin,
                       int64_t end) {
  const int64_t base = row * a.dim;
  T* __restrict phi = a.phi + base;
  const T* __restrict grad = a.grad + base;
  const T* __restrict theta = a.theta;
  const T* __restrict lam = a.lam;
  const T lam0 = lam[0];
  for (int64_t i = begin; i < end; ++i)
    phi[i] -= rule(prox_gradient(phi[i], grad[i], theta[i], kDiagonal ? lam[i] : lam0), base + i);
}

template <bool kDiagonal, typename T>
IMAML_INLINE ProxSums sums(const ProxArgs<T>& a, int64_t row, int64_t begin, int64_t end) {
  const T* __restrict phi = a.phi + row * a.dim;
  const T* __restrict grad = a.grad + row * a.dim;
  const T* __restrict theta = a.theta;
  const T* __restrict lam = a.lam;
  const T lam0 = lam[0];
  double norm2[kLanes] = {}, penalty[kLanes] = {};
  for_lanes(begin, end, [&](int64_t i, int lane) {
    const T lam_i = kDiagonal ? lam[i] : lam0;
    norm2[lane] += square(prox_gradient(phi[i], grad[i], theta[i], lam_i));
    penalty[lane] += static_cast<double>(lam_i) * square(phi[i] - theta[i]);
  });
  return {sum_lanes(norm2), sum_lanes(penalty)};
}

template <typename T>
IMAML_INLINE double dot_body(const T* __restrict a, const T* __restrict b, int64_t begin,
                             int64_t end) {
  double total[kLanes] = {};
  for_lanes(begin, end, [&](int64_t i, int lane) {
    total[lane] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  });
  return sum_lanes(total);
}

// Elements of a row that are added to all sums before those of the next row.
constexpr int64_t kSumsInCache = 512;

// kUse is the row's `use`.
template <int kUse, typename T>
IMAML_INLINE void add_terms(const PullBackArgs<T>& a, int64_t row, int64_t begin, int64_t count,
                            double* __restrict sums, double* __restrict products) {
  const T* __restrict x = a.x + row * a.dim + begin;
  const T* __restrict phi = a.phi + row * a.dim + begin;
  const T* __restrict theta = a.theta + begin;
  const T weight = a.weight[0];
  for (int64_t i = 0; i < count; ++i) {
    const PullBackTerms<T> terms(kUse, x[i], phi[i], theta[i], weight);
    sums[i] += terms.x;
    products[i] += terms.product;
  }
}

template <typename T>
IMAML_INLINE void pull_back_body(const PullBackArgs<T>& a, int64_t begin, int64_t end) {
  for (; begin < end; begin += kSumsInCache) {
    const int64_t count = end - begin < kSumsInCache ? end - begin : kSumsInCache;
    double sums[kSumsInCache] = {}, products[kSumsInCache] = {};
    for (int64_t row = 0; row < a.rows; ++row) {
      if (a.use[row] > 1)
        add_terms<2>(a, row, begin, count, sums, products);
      else if (a.use[row] > 0)
        add_terms<1>(a, row, begin, count, sums, products);
      else
        add_terms<0>(a, row, begin, count, sums, products);
    }
    for (int64_t i = 0; i < count; ++i) {
      a.sums[begin + i] = static_cast<T>(sums[i]);
      a.sums[a.dim + begin + i] = static_cast<T>(products[i]);
    }
  }
}

template <typename T>
IMAML_INLINE CgNorms update_any(const CgArgs<T>& a, const CgStep& step, int64_t row, int64_t begin,
                                int64_t end) {
  if (a.inverse == nullptr)
    return a.lam_stride ? update<true, false>(a, step, row, begin, end)
                        : update<false, false>(a, step, row, begin, end);
  return a.lam_stride ? update<true, true>(a, step, row, begin, end)
                      : update<false, true>(a, step, row, begin, end);
}

}  // namespace

// target_clones applies to functions, not to templates: one plain function per element type.
#define IMAML_DEFINE(T)                                                                          \
  IMAML_MULTIVERSION CgSums cg_curvature(const CgArgs<T>& a, int64_t row, int64_t begin,         \
                                         int64_t end) {                                          \
    return a.lam_stride ? curvature<true>(a, row, begin, end)                                    \
                        : curvature<false>(a, row, begin, end);                                  \
  }                                                                                              \
  IMAML_MULTIVERSION CgNorms cg_update(const CgArgs<T>& a, const CgStep& step, int64_t row,      \
                                       int64_t begin, int64_t end) {                             \
    return update_any(a, step, row, begin, end);                                                 \
  }                                                                                              \
  IMAML_MULTIVERSION void cg_update_direction(const CgArgs<T>& a, const CgDirection& next,       \
                                              int64_t row, int64_t begin, int64_t end) {         \
    a.inverse == nullptr ? update_direction<false>(a, next, row, begin, end)                     \
                         : update_direction<true>(a, next, row, begin, end);                     \
  }                                                                                              \
  IMAML_MULTIVERSION void prox_step(const ProxArgs<T>& a, const Descent<T>& rule, int64_t row,   \
                                    int64_t begin, int64_t end) {                                \
    a.lam_stride ? step<true>(a, rule, row, begin, end) : step<false>(a, rule, row, begin, end); \
  }                                                                                              \
  IMAML_MULTIVERSION void prox_step(const ProxArgs<T>& a, const Adam<T>& rule, int64_t row,      \
                                    int64_t begin, int64_t end) {                                \
    a.lam_stride ? step<true>(a, rule, row, begin, end) : step<false>(a, rule, row, begin, end); \
  }                                                                                              \
  IMAML_MULTIVERSION ProxSums prox_sums(const ProxArgs<T>& a, int64_t row, int64_t begin,        \
                                        int64_t end) {                                           \
    return a.lam_stride ? sums<true>(a, row, begin, end) : sums<false>(a, row, begin, end);      \
  }                                                                                              \
  IMAML_MULTIVERSION double dot(const T* a, const T* b, int64_t begin, int64_t end) {            \
    return dot_body(a, b, begin, end);                                                           \
  }                                                                                              \
  IMAML_MULTIVERSION void pull_back(const PullBackArgs<T>& a, int64_t begin, int64_t end) {      \
    pull_back_body(a, begin, end);                                                               \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

const char* instruction_set() {
#if defined(IMAML_HAS_MULTIVERSION)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace imaml::cpu
