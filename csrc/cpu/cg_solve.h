// Conjugate gradient from x = 0 to the end, row by row, for products that are computed between the
// iterations; the arithmetic of an iteration is that of rows.h.
//
// Also decides whether a row is plain: finite, and with a recurrence that cannot have drifted and a
// residual that is not larger than at the start. Only other rows need the checks of
// solvers/linear/cg.py, which has the source of the bounds.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/rows.h"

namespace imaml::cpu {

// Buffers of [rows, dim], [rows], and [iterations, rows], contiguous; `link` has a row less.
template <typename T>
struct CgSolve {
  const T* b;
  CgArgs<T> step;  // without a preconditioner; curvature and beta of the first iteration
  double rtol, atol;
  std::int64_t iterations;
  double* diagonal;  // out: the tridiagonal matrix of the Lanczos process
  double* link;
  std::int32_t* count;  // out: its size
  double* norm;         // out: |b|
  double* tol2;         // out

  // Before the first product, which is that of p = b.
  void begin(std::int64_t row) const {
    const std::int64_t at = row * step.dim, bytes = step.dim * static_cast<std::int64_t>(sizeof(T));
    std::memcpy(step.r + at, b + at, static_cast<std::size_t>(bytes));
    std::memcpy(step.p + at, b + at, static_cast<std::size_t>(bytes));
    std::memset(step.x + at, 0, static_cast<std::size_t>(bytes));
    const double rr = squared_norm(b, row), least = std::max(rtol, kEpsilon<T>);
    step.rr[row] = rr;
    norm[row] = std::sqrt(rr);
    tol2[row] = std::max(least * least * rr, atol * atol);
    step.status[row] = !is_finite(rr) ? kNonfinite : rr <= tol2[row] ? kConverged : kRunning;
    step.steps[row] = 0;
    for (std::int64_t k = 0; k < iterations; ++k)
      step.curvature[k * step.rows + row] = step.beta[k * step.rows + row] = 0;
  }

  // After product k. Returns whether the row needs another one.
  bool advance(std::int64_t row, std::int64_t k) const {
    CgArgs<T> now = step;
    now.curvature += k * step.rows;
    now.beta += k * step.rows;
    cg_step_row(now, row, Serial{});
    return step.status[row] == kRunning;
  }

  // After the last product: rr becomes the residual. Returns whether the row is plain.
  bool end(std::int64_t row) const {
    double largest = -INFINITY;
    for (std::int64_t k = 0; k < iterations; ++k) {
      const std::int64_t at = k * step.rows + row, before = at - step.rows;
      diagonal[at] = step.curvature[at];
      if (k > 0) {
        diagonal[at] += step.beta[before] * step.curvature[before];
        link[before] = std::sqrt(step.beta[before]) * step.curvature[before];
      }
      largest = std::max(largest, diagonal[at]);
    }
    const std::int32_t status = step.status[row], steps = step.steps[row];
    count[row] = steps + (status == kNegativeCurvature ? 1 : 0);
    const double residual = step.rr[row] = std::sqrt(step.rr[row]);
    const double xx = squared_norm(step.x, row), error = kEpsilon<T> * largest * std::sqrt(xx);
    const bool measures = rtol > 0 || atol > 0;
    const double floor = (measures ? 10 : 1000) * kEpsilon<T>;
    const double tol = std::max(std::max(rtol, floor) * norm[row], atol);
    // Written so that NaN is not plain.
    return status != kNonfinite && is_finite(xx) && 20 * error <= std::max(residual, tol) &&
           (steps == 0 || residual + 10 * error <= norm[row]);
  }

 private:
  double squared_norm(const T* rows, std::int64_t row) const {
    const T* const first = rows + row * step.dim;
    return sum_chunks<double>(step.dim, Serial{}, [&](std::int64_t begin, std::int64_t end) {
      return dot(first, first, begin, end);
    });
  }
};

}  // namespace imaml::cpu
