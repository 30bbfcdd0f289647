// CPU kernels on a range [begin, end) of one row: plain pointers, no torch, no threads.
//
// Every function exists for float and double. Sums use 16 independent float64 lanes, which the
// compiler can vectorise without reordering the additions.
#pragma once
#include <cstdint>

#include "formulas.h"

namespace imaml::cpu {

using std::int64_t;

struct ProxSums {
  double grad_norm2 = 0;  // |grad + lam (phi - theta)|^2
  double penalty = 0;     // (phi - theta)' diag(lam) (phi - theta)

  void operator+=(const ProxSums& part) {
    grad_norm2 += part.grad_norm2;
    penalty += part.penalty;
  }
};

#define IMAML_DECLARE(T)                                                                          \
  CgSums cg_curvature(const CgArgs<T>&, int64_t row, int64_t begin, int64_t end);                 \
  CgNorms cg_update(const CgArgs<T>&, const CgStep&, int64_t row, int64_t begin, int64_t end);    \
  void cg_update_direction(const CgArgs<T>&, const CgDirection&, int64_t row, int64_t begin,      \
                           int64_t end);                                                          \
  void prox_step(const ProxArgs<T>&, const Descent<T>&, int64_t row, int64_t begin, int64_t end); \
  void prox_step(const ProxArgs<T>&, const Adam<T>&, int64_t row, int64_t begin, int64_t end);    \
  ProxSums prox_sums(const ProxArgs<T>&, int64_t row, int64_t begin, int64_t end);                \
  double dot(const T* a, const T* b, int64_t begin, int64_t end);                                 \
  void pull_back(const PullBackArgs<T>&, int64_t begin, int64_t end);
IMAML_DECLARE(float)
IMAML_DECLARE(double)
#undef IMAML_DECLARE

// The clone that runs on this machine: "baseline", "x86-64-v3" or "x86-64-v4".
const char* instruction_set();

}  // namespace imaml::cpu
