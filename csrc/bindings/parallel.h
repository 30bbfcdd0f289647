// torch's thread pool for translation units that do not include torch.
#pragma once
#include <cstdint>

namespace imaml {

using ParallelBody = void (*)(const void* context, std::int64_t first, std::int64_t last);

// Calls body(context, first, last) for ranges that together cover [0, n).
void run_in_parallel(std::int64_t n, std::int64_t grain, ParallelBody body, const void* context);

}  // namespace imaml
