// Batch norm and its two derivatives on the CPU: plain pointers, no torch. The formulas are in
// norm_formulas.h.
//
// Bound by memory: a pass reads its images twice and writes once, kNormRows rows at a time for all
// blocks of kNormLanes channels. Terms are added up in T over those rows, and in float64 over the
// groups of rows: converting every term would take longer than reading it. The order of a sum does
// not depend on the division of the work: the same input gives the same bits for any number of
// threads.
#pragma once
#include "cpu/blocks.h"
#include "norm_formulas.h"

namespace imaml::cpu {

inline constexpr int64_t kNormLanes = 16;
inline constexpr int64_t kNormRows = 16;

#define IMAML_DECLARE(Pass) void norm_blocks(const Pass&, int64_t task, Blocks);
IMAML_DECLARE(NormForward<float>)
IMAML_DECLARE(NormForward<double>)
IMAML_DECLARE(NormBackward<float>)
IMAML_DECLARE(NormBackward<double>)
IMAML_DECLARE(NormDoubleBackward<float>)
IMAML_DECLARE(NormDoubleBackward<double>)
#undef IMAML_DECLARE

// `pass` is one of the above.
template <typename Pass, typename ParallelFor>
void batch_norm(const Pass& pass, int threads, const ParallelFor& parallel_for) {
  const int64_t blocks = (pass.shape.channels + kNormLanes - 1) / kNormLanes;
  for_blocks(pass.shape.tasks, blocks, threads, parallel_for,
             [&](int64_t task, Blocks range) { norm_blocks(pass, task, range); });
}

}  // namespace imaml::cpu
