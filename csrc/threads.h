// torch's thread pool, as the drivers of the CPU kernels take it.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace imaml {

inline constexpr auto parallel_for = [](std::int64_t n, std::int64_t grain, const auto& body) {
  torch::stable::parallel_for(0, n, grain, body);
};

inline int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace imaml
