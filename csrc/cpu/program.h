// A program: the work of one task, as a list of instructions on strided arrays of float or double.
// It replaces hundreds of operator calls on small tensors, whose dispatch takes longer than their
// arithmetic. All instructions are validated and prepared once; running one costs a call.
//
// Arrays lie in slots: slot 0 is scratch memory of each task (the arena), slot 1 constants shared
// by all tasks, slots 2, 3, ... buffers of the caller. Every task is run by one thread, in order:
// the result has the same bits for any number of threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace imaml::cpu {

using std::int64_t;

enum class DType { kFloat32, kFloat64, kInt64, kInt32, kUint8 };

// Element (i, j, ...) of an array is at offset + i * strides[0] + j * strides[1] + ...
struct Operand {
  int64_t slot, offset;
  std::vector<int64_t> strides;  // one per loop, in elements; 0 repeats the array
};

// program_*.cpp define the instructions. Operand 0 is the result. It may share memory with another
// operand only where both are the same array with the same strides.
struct Instruction {
  std::string name;
  std::vector<int64_t> sizes;  // of the loops, the last is the innermost
  std::vector<Operand> operands;
  std::vector<int64_t> integers;
  std::vector<double> scalars;
};

struct Call;  // a prepared instruction

using After = std::function<bool(int64_t task, int64_t run)>;

class Program {
 public:
  // `slots` are the types of slots 2, 3, ... Throws std::invalid_argument.
  Program(DType type, int64_t arena, const std::vector<double>& constants, std::vector<DType> slots,
          const std::vector<Instruction>& instructions);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // The number of elements that a task uses of slots 2, 3, ..., from its first one on.
  const std::vector<int64_t>& extents() const { return extents_; }

  // Runs all tasks; task t begins at pointers[k] + t * strides[k] elements in slot k + 2. Returns
  // whether all indices were in range; an element whose index is not is skipped, or read as 0.
  // Throws std::invalid_argument.
  template <typename ParallelFor>
  bool run(int64_t tasks, const std::vector<void*>& pointers, const std::vector<int64_t>& strides,
           const ParallelFor& parallel_for) const {
    return repeat(1, tasks, pointers, strides, parallel_for, [](int64_t, int64_t) { return true; });
  }

  // Runs every task up to `times` times: after run k of a task, as long as after(task, k) is true.
  // A task's data stay in cache between its runs.
  template <typename ParallelFor>
  bool repeat(int64_t times, int64_t tasks, const std::vector<void*>& pointers,
              const std::vector<int64_t>& strides, const ParallelFor& parallel_for,
              const After& after) const {
    check_buffers(tasks, pointers, strides);
    std::atomic<bool> in_range{true};
    const int64_t grain = std::max<int64_t>(1, grain_ / std::max<int64_t>(1, times));
    parallel_for(tasks, grain, [&](int64_t first, int64_t last) {
      if (!run_tasks(times, first, last, pointers, strides, after)) in_range = false;
    });
    return in_range;
  }

  DType type() const { return type_; }

 private:
  void check_buffers(int64_t tasks, const std::vector<void*>& pointers,
                     const std::vector<int64_t>& strides) const;
  bool run_tasks(int64_t times, int64_t first, int64_t last, const std::vector<void*>& pointers,
                 const std::vector<int64_t>& strides, const After& after) const;

  DType type_;
  int64_t arena_;
  std::vector<DType> slots_;
  std::vector<double> constants_;  // as bytes: elements of type_
  std::vector<Call> calls_;
  std::vector<int64_t> extents_;
  std::vector<bool> written_;  // by slot
  int64_t scratch_ = 0;        // elements, the most that a call needs
  int64_t grain_ = 1;          // tasks that are worth a thread
};

}  // namespace imaml::cpu
