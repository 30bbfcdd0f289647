// Sums over the rows of a task's channels on the CPU: plain pointers, no torch. In float64 and in
// the order of the rows: the same bits for any number of threads.
#pragma once
#include <algorithm>

#include "norm_formulas.h"

namespace imaml::cpu {

using std::int64_t;

inline constexpr int64_t kSumLanes = 16;

template <typename T, typename ParallelFor>
void channel_sums(const NormShape& s, const T* g, T* out, const ParallelFor& parallel_for) {
  const int64_t groups = (s.channels + kSumLanes - 1) / kSumLanes;
  parallel_for(s.tasks * groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t task = item / groups, channel = item % groups * kSumLanes;
      const int64_t count = std::min(kSumLanes, s.channels - channel);
      const T* from = g + task * s.rows * s.channels + channel;
      double sum[kSumLanes] = {};
      for (int64_t row = 0; row < s.rows; ++row)
        for (int64_t c = 0; c < count; ++c)
          sum[c] += static_cast<double>(from[row * s.channels + c]);
      for (int64_t c = 0; c < count; ++c)
        out[task * s.channels + channel + c] = static_cast<T>(sum[c]);
    }
  });
}

}  // namespace imaml::cpu
