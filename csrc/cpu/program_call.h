// Prepared instructions: what program.cpp runs and program_*.cpp define.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "cpu/program.h"
#include "formulas.h"

namespace imaml::cpu {

constexpr int kMaxLoops = 6;

// Where an operand lies.
struct Place {
  int64_t stride[kMaxLoops] = {};  // in elements, of the innermost loop first
  int64_t slot = 0;
  int64_t offset = 0;  // in bytes
};

// The memory of one task.
struct Frame {
  char* const* slots;
  void* scratch;  // Call::scratch elements
  bool in_range = true;

  template <typename T>
  IMAML_INLINE T* at(const Place& place) const {
    return reinterpret_cast<T*>(slots[place.slot] + place.offset);
  }
};

using Kernel = void (*)(const Call&, Frame&);

struct Call {
  Kernel kernel = nullptr;
  int loops = 0;
  int64_t size[kMaxLoops] = {};  // of the innermost loop first
  std::vector<Place> places;
  std::vector<int64_t> integers;
  std::vector<double> scalars;
  int64_t scratch = 0;               // elements
  std::shared_ptr<const void> plan;  // what a layer prepares
};

// One kernel for each type.
struct KernelPair {
  Kernel of_float, of_double;
  Kernel of(DType type) const { return type == DType::kFloat32 ? of_float : of_double; }
};

// The form of an instruction's arguments.
struct Signature {
  std::size_t operands = 0, more_operands = 0;  // more: optional
  std::size_t integers = 0, scalars = 0;
  std::size_t results = 1;  // the first operands
};

// What an instruction's preparation may depend on.
struct Types {
  DType result;
  DType source;  // of operand 1
};

// Each kind of instruction has a function that sets `signature` and returns how to prepare a call,
// or null where it does not know the name. The preparation chooses the kernel and may reorder and
// merge the call's loops. It throws std::invalid_argument.
using Prepare = void (*)(const std::string& name, const Types& types, Call& call);
Prepare find_unary(const std::string& name, Signature& signature);
Prepare find_binary(const std::string& name, Signature& signature);
Prepare find_reduction(const std::string& name, Signature& signature);
Prepare find_product(const std::string& name, Signature& signature);
Prepare find_indexing(const std::string& name, Signature& signature);
Prepare find_layer(const std::string& name, Signature& signature);

// The number of elements of a layer's operand, which is contiguous; -1 of other instructions.
// Throws std::invalid_argument if the integers are not those of a layer.
int64_t layer_elements(const Instruction& one, std::size_t operand);
// The multiplications of a layer; 0 of other instructions.
double layer_work(const Instruction& one);

// program_loops.cpp. Loops are numbered from the innermost.
void drop_unit_loops(Call& call, int first = 0);
void merge_loops(Call& call, int first = 0);
// Adds a loop of size 1 to a call without loops.
void add_unit_loop(Call& call);
// Moves loops to the order `order`: loop k is then what was order[k].
void reorder_loops(Call& call, const std::vector<int>& order);
// The loops in ascending order of the operand's stride.
std::vector<int> by_stride(const Call& call, std::size_t operand);

// Calls body(offsets of the operands) for all indices of the loops [first, last).
template <int kOperands, typename Body>
IMAML_INLINE void for_loops(const Call& call, int first, int last, const Body& body) {
  const Place* places = call.places.data();
  int64_t at[kOperands] = {}, index[kMaxLoops] = {};
  for (;;) {
    body(static_cast<const int64_t*>(at));
    int k = first;
    for (; k < last; ++k) {
      for (int o = 0; o < kOperands; ++o) at[o] += places[o].stride[k];
      if (++index[k] < call.size[k]) break;
      index[k] = 0;
      for (int o = 0; o < kOperands; ++o) at[o] -= places[o].stride[k] * call.size[k];
    }
    if (k >= last) return;
  }
}

}  // namespace imaml::cpu
