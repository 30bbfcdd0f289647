// The operators on rows on the CPU: runs the kernels of row_kernels.h on all rows, with any
// parallel_for(n, grain, body(begin, end)).
//
// Determinism: a row is cut into chunks of kChunk elements for any number of threads; each chunk is
// summed separately, and chunk sums are added in order. Threads take whole rows where there are at
// least as many rows as threads, chunks of one row otherwise.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/row_kernels.h"

namespace imaml::cpu {

constexpr int64_t kChunk = 4096;

inline int64_t chunk_count(int64_t dim) { return (dim + kChunk - 1) / kChunk; }

struct Serial {
  template <typename Body>
  void operator()(int64_t n, int64_t, const Body& body) const {
    if (n > 0) body(int64_t{0}, n);
  }
};

// Calls body(begin, end, chunk) for every chunk of a row.
template <typename ParallelFor, typename Body>
void for_chunks(int64_t dim, const ParallelFor& parallel_for, const Body& body) {
  parallel_for(chunk_count(dim), 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk)
      body(chunk * kChunk, std::min(dim, (chunk + 1) * kChunk), chunk);
  });
}

// Calls row_body(row, parallel_for_within_the_row) for every row.
template <typename ParallelFor, typename RowBody>
void for_rows(int64_t rows, int64_t dim, int threads, const ParallelFor& parallel_for,
              const RowBody& row_body) {
  if (rows < threads && chunk_count(dim) > 1) {
    for (int64_t row = 0; row < rows; ++row) row_body(row, parallel_for);
    return;
  }
  // Another thread is worth its start-up time from about 32k elements on.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(dim, 1));
  parallel_for(rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) row_body(row, Serial{});
  });
}

// The sum of part(begin, end) over a row's chunks, added in order.
template <typename Sum, typename ParallelFor, typename Part>
Sum sum_chunks(int64_t dim, const ParallelFor& parallel_for, const Part& part) {
  Sum total{};
  if constexpr (std::is_same_v<ParallelFor, Serial>) {
    for_chunks(dim, parallel_for,
               [&](int64_t begin, int64_t end, int64_t) { total += part(begin, end); });
  } else {
    std::vector<Sum> parts(static_cast<std::size_t>(chunk_count(dim)));
    for_chunks(dim, parallel_for, [&](int64_t begin, int64_t end, int64_t chunk) {
      parts[static_cast<std::size_t>(chunk)] = part(begin, end);
    });
    for (const Sum& one : parts) total += one;
  }
  return total;
}

// An iteration of one row; chunks are divided by `within`.
template <typename T, typename ParallelFor>
void cg_step_row(const CgArgs<T>& a, int64_t row, const ParallelFor& within) {
  if (a.status[row] != kRunning) {
    a.curvature[row] = a.beta[row] = 0;
    return;
  }
  const CgSums sums = sum_chunks<CgSums>(
      a.dim, within, [&](int64_t begin, int64_t end) { return cg_curvature(a, row, begin, end); });
  const double rz_old = cg_old_rz(a, row);
  const CgStep step = cg_step_length<T>(sums, rz_old, a.steps[row]);
  CgNorms norms;
  if (step.action != kFreeze)
    norms = sum_chunks<CgNorms>(a.dim, within, [&](int64_t begin, int64_t end) {
      return cg_update(a, step, row, begin, end);
    });
  const CgDirection next = cg_direction(step, norms, rz_old, a.tol2[row]);
  if (next.action != kFreeze)
    for_chunks(a.dim, within, [&](int64_t begin, int64_t end, int64_t) {
      cg_update_direction(a, next, row, begin, end);
    });
  cg_record(a, row, sums, step, next, norms, rz_old);
}

template <typename T, typename ParallelFor>
void cg_step(const CgArgs<T>& a, int threads, const ParallelFor& parallel_for) {
  for_rows(a.rows, a.dim, threads, parallel_for,
           [&](int64_t row, const auto& within) { cg_step_row(a, row, within); });
}

// A step of one row; chunks are divided by `within`.
template <typename T, typename Rule, typename ParallelFor>
void prox_step_row(const ProxArgs<T>& a, const Rule& rule, int64_t row, const ParallelFor& within) {
  if (!prox_is_running(a, row)) return;
  for_chunks(a.dim, within,
             [&](int64_t begin, int64_t end, int64_t) { prox_step(a, rule, row, begin, end); });
}

template <typename T, typename Rule, typename ParallelFor>
void prox_step(const ProxArgs<T>& a, const Rule& rule, int threads,
               const ParallelFor& parallel_for) {
  for_rows(a.rows, a.dim, threads, parallel_for,
           [&](int64_t row, const auto& within) { prox_step_row(a, rule, row, within); });
}

template <typename T, typename ParallelFor>
void prox_norms(const ProxArgs<T>& a, double* out, int threads, const ParallelFor& parallel_for) {
  for_rows(a.rows, a.dim, threads, parallel_for, [&](int64_t row, const auto& within) {
    const ProxSums sums = sum_chunks<ProxSums>(
        a.dim, within, [&](int64_t begin, int64_t end) { return prox_sums(a, row, begin, end); });
    out[2 * row] = sums.grad_norm2;
    out[2 * row + 1] = sums.penalty;
  });
}

template <typename T, typename ParallelFor>
void row_dot(const T* a, const T* b, double* out, int64_t rows, int64_t dim, int threads,
             const ParallelFor& parallel_for) {
  for_rows(rows, dim, threads, parallel_for, [&](int64_t row, const auto& within) {
    out[row] = sum_chunks<double>(dim, within, [&](int64_t begin, int64_t end) {
      return dot(a + row * dim, b + row * dim, begin, end);
    });
  });
}

// Every element of the sums is added by one thread, in the order of the rows.
template <typename T, typename ParallelFor>
void pull_back(const PullBackArgs<T>& a, const ParallelFor& parallel_for) {
  for_chunks(a.dim, parallel_for,
             [&](int64_t begin, int64_t end, int64_t) { pull_back(a, begin, end); });
}

}  // namespace imaml::cpu
