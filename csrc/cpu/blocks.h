// How the layers divide their work among threads: by task, or by blocks of a task's outputs where
// the tasks would load the threads unevenly.
#pragma once
#include <cstdint>

namespace imaml::cpu {

using std::int64_t;

// [first, last)
struct Blocks {
  int64_t first, last;
};

// Calls body(task, blocks) with all blocks of a task, so that their common operands are read once,
// or with one block at a time where the tasks would load the threads unevenly.
template <typename ParallelFor, typename Body>
void for_blocks(int64_t tasks, int64_t blocks, int threads, const ParallelFor& parallel_for,
                const Body& body) {
  const bool whole_tasks = tasks % threads == 0 || tasks >= 8 * threads;
  const int64_t parts = whole_tasks ? 1 : blocks, size = whole_tasks ? blocks : 1;
  parallel_for(tasks * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item)
      body(item / parts, Blocks{item % parts * size, (item % parts + 1) * size});
  });
}

}  // namespace imaml::cpu
