// How the layers share out their work: by task, and by blocks of outputs where that is uneven.
#pragma once
#include <cstdint>

namespace imaml::cpu {

using std::int64_t;

// [first, last)
struct Blocks {
  int64_t first, last;
};

// Calls body(task, blocks): with all blocks of a task together, so that what they share is read
// once, or one by one where the threads would not be evenly loaded.
template <typename ParallelFor, typename Body>
void for_blocks(int64_t tasks, int64_t blocks, int threads, const ParallelFor& parallel_for,
                const Body& body) {
  const bool together = tasks % threads == 0 || tasks >= 8 * threads;
  const int64_t parts = together ? 1 : blocks, size = together ? blocks : 1;
  parallel_for(tasks * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item)
      body(item / parts, Blocks{item % parts * size, (item % parts + 1) * size});
  });
}

}  // namespace imaml::cpu
