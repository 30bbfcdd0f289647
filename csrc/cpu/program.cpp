// Validation, preparation and execution of programs.
#include "cpu/program.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <sstream>
#include <stdexcept>

#include "cpu/program_call.h"

namespace imaml::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kBuiltinSlots = 2;  // arena, constants
// What a thread should do at least, in scalar operations: a few microseconds.
constexpr int64_t kThreadWork = 20000;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

constexpr int64_t size_of(DType type) {
  return type == DType::kUint8 ? 1 : type == DType::kFloat32 || type == DType::kInt32 ? 4 : 8;
}

int64_t round_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

Prepare find(const std::string& name, Signature& signature) {
  for (const auto find_kind :
       {find_unary, find_binary, find_reduction, find_product, find_indexing, find_layer})
    if (const Prepare prepare = find_kind(name, signature)) return prepare;
  return nullptr;
}

// A thread's memory for a task. It grows to the largest program's needs.
char* thread_memory(int64_t bytes) {
  struct Delete {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
  };
  thread_local std::unique_ptr<char, Delete> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<char*>(
        ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{kAlignment})));
    size = bytes;
  }
  return memory.get();
}

// The instructions of one program, checked and prepared.
class Preparation {
 public:
  Preparation(DType type, int64_t arena, int64_t constants, const std::vector<DType>& slots)
      : type_(type), slots_(slots), extents_(slots.size() + kBuiltinSlots) {
    limits_ = {arena, constants};
  }

  Call prepare(const Instruction& one) {
    Signature form{};
    const Prepare prepare = find(one.name, form);
    if (prepare == nullptr) fail("unknown instruction '", one.name, "'");
    check_form(one, form);
    Call call;
    call.loops = static_cast<int>(one.sizes.size());
    std::reverse_copy(one.sizes.begin(), one.sizes.end(), call.size);
    for (std::size_t o = 0; o < one.operands.size(); ++o)
      call.places.push_back(place(one, o, o < form.results));
    call.integers = one.integers;
    call.scalars = one.scalars;
    prepare(one.name, {type_, type_of(one.operands.at(1).slot)}, call);
    return call;
  }

  // The slots of all results.
  const std::vector<int64_t>& results() const { return results_; }

  std::vector<int64_t> extents() const {
    return {extents_.begin() + kBuiltinSlots, extents_.end()};
  }

 private:
  DType type_of(int64_t slot) const {
    return slot < kBuiltinSlots ? type_ : slots_[static_cast<std::size_t>(slot - kBuiltinSlots)];
  }

  void check_form(const Instruction& one, const Signature& form) const {
    const auto check = [&](const char* what, std::size_t got, std::size_t least, std::size_t most) {
      if (got < least || got > most)
        fail(one.name, ": expected ", least, most > least ? " to " + std::to_string(most) : "", " ",
             what, ", got ", got);
    };
    check("loops", one.sizes.size(), 0, kMaxLoops);
    check("operands", one.operands.size(), form.operands, form.operands + form.more_operands);
    check("integers", one.integers.size(), form.integers, form.integers);
    check("scalars", one.scalars.size(), form.scalars, form.scalars);
    for (const int64_t size : one.sizes)
      if (size < 0) fail(one.name, ": sizes must not be negative, got ", size);
  }

  Place place(const Instruction& one, std::size_t index, bool is_result) {
    const Operand& operand = one.operands[index];
    const auto refuse = [&](const auto&... parts) {
      fail(one.name, ": operand ", index, " ", parts...);
    };
    if (operand.slot < 0 || operand.slot >= static_cast<int64_t>(extents_.size()))
      refuse("must be in slot 0 to ", extents_.size() - 1, ", got ", operand.slot);
    if (operand.strides.size() != one.sizes.size())
      refuse("must have ", one.sizes.size(), " strides, got ", operand.strides.size());
    if (operand.offset < 0) refuse("must not have a negative offset, got ", operand.offset);
    for (const int64_t stride : operand.strides)
      if (stride < 0) refuse("must not have a negative stride, got ", stride);
    if (is_result) results_.push_back(operand.slot);
    if (is_result && operand.slot == 1) refuse("is a result and must not be in the constants");
    if (type_of(operand.slot) != type_ && (one.name != "copy" || index != 1))
      refuse("must have the program's dtype: only 'copy' converts, and only its source");
    use(one, index, refuse);
    Place place;
    std::reverse_copy(operand.strides.begin(), operand.strides.end(), place.stride);
    place.slot = operand.slot;
    place.offset = operand.offset * size_of(type_of(operand.slot));
    return place;
  }

  // Checks and records the largest element that the operand uses.
  template <typename Refuse>
  void use(const Instruction& one, std::size_t index, const Refuse& refuse) {
    const Operand& operand = one.operands[index];
    // A sum over no elements still writes its result, and reads what it is added to.
    const bool outside_sum = index == 0 || (one.name == "matmul" && index == 3);
    __int128 last = operand.offset;
    bool empty = false;
    for (std::size_t k = 0; k < one.sizes.size(); ++k) {
      empty = empty || (one.sizes[k] == 0 && !(outside_sum && operand.strides[k] == 0));
      last += static_cast<__int128>(one.sizes[k] - 1) * operand.strides[k];
    }
    // The operand that is indexed; its stride along the indexed dimension is the first integer.
    const bool indexed =
        (one.name == "gather" && index == 1) || (one.name.rfind("scatter_", 0) == 0 && index == 0);
    if (indexed) {
      if (one.integers[0] < 0 || one.integers[1] < 0)
        fail(one.name, ": integers must not be negative, got ", one.integers[0], " and ",
             one.integers[1]);
      empty = empty || one.integers[1] == 0;
      last += static_cast<__int128>(one.integers[1] - 1) * one.integers[0];
    }
    if (const int64_t elements = layer_elements(one, index); elements >= 0) {
      empty = elements == 0;
      last += elements - 1;
    }
    if (empty) return;
    const auto slot = static_cast<std::size_t>(operand.slot);
    const int64_t most =
        operand.slot < kBuiltinSlots ? limits_[slot] : std::numeric_limits<int64_t>::max() / 16;
    if (last >= most)
      refuse("leaves its slot of ", most, " elements: its last index is ",
             static_cast<double>(last));
    extents_[slot] = std::max(extents_[slot], static_cast<int64_t>(last) + 1);
  }

  DType type_;
  const std::vector<DType>& slots_;
  std::vector<int64_t> extents_, limits_, results_;
};

int64_t work_of(const Instruction& one) {
  double work = 50;
  double elements = 1;
  for (const int64_t size : one.sizes) elements *= static_cast<double>(size);
  work += std::max(elements, layer_work(one));
  return static_cast<int64_t>(std::min(work, 1e9));
}

}  // namespace

Program::Program(DType type, int64_t arena, const std::vector<double>& constants,
                 std::vector<DType> slots, const std::vector<Instruction>& instructions)
    : type_(type), arena_(arena), slots_(std::move(slots)), constants_(constants) {
  if (type != DType::kFloat32 && type != DType::kFloat64)
    fail("a program's dtype must be float32 or float64");
  if (arena < 0 || arena > std::numeric_limits<int64_t>::max() / 64)
    fail("the arena's size must not be negative nor larger than memory, got ", arena);
  if (type == DType::kFloat32) {
    const std::vector<float> narrow(constants.begin(), constants.end());
    if (!narrow.empty()) std::memcpy(constants_.data(), narrow.data(), narrow.size() * 4);
  }
  Preparation preparation(type, arena, static_cast<int64_t>(constants.size()), slots_);
  written_.resize(slots_.size());
  int64_t work = 1;
  for (const Instruction& one : instructions) {
    Call call = preparation.prepare(one);
    work += work_of(one);
    scratch_ = std::max(scratch_, call.scratch);
    if (call.kernel != nullptr) calls_.push_back(std::move(call));
  }
  for (const int64_t slot : preparation.results())
    if (slot >= kBuiltinSlots) written_[static_cast<std::size_t>(slot - kBuiltinSlots)] = true;
  extents_ = preparation.extents();
  grain_ = std::max<int64_t>(1, kThreadWork / work);
}

Program::~Program() = default;

void Program::check_buffers(int64_t tasks, const std::vector<void*>& pointers,
                            const std::vector<int64_t>& strides) const {
  if (tasks < 0) fail("the number of tasks must not be negative, got ", tasks);
  if (pointers.size() != slots_.size() || strides.size() != slots_.size())
    fail("expected ", slots_.size(), " pointers and strides, got ", pointers.size(), " and ",
         strides.size());
  for (std::size_t k = 0; k < slots_.size(); ++k) {
    if (tasks > 0 && extents_[k] > 0 && pointers[k] == nullptr)
      fail("slot ", k + kBuiltinSlots, " is used, but its pointer is null");
    if (tasks > 1 && written_[k] && strides[k] == 0)
      fail("slot ", k + kBuiltinSlots, " is written and must not be shared by all tasks");
  }
}

bool Program::run_tasks(int64_t times, int64_t first, int64_t last,
                        const std::vector<void*>& pointers, const std::vector<int64_t>& strides,
                        const After& after) const {
  const int64_t count = static_cast<int64_t>(slots_.size()) + kBuiltinSlots;
  const int64_t pointer_bytes = round_up(count * static_cast<int64_t>(sizeof(char*)));
  const int64_t arena_bytes = round_up(arena_ * size_of(type_));
  char* memory =
      thread_memory(pointer_bytes + arena_bytes + round_up(scratch_ * size_of(type_)) + kAlignment);
  char** slots = reinterpret_cast<char**>(memory);
  slots[0] = memory + pointer_bytes;
  slots[1] = reinterpret_cast<char*>(const_cast<double*>(constants_.data()));
  Frame frame{slots, slots[0] + arena_bytes};
  for (int64_t task = first; task < last; ++task) {
    for (std::size_t k = 0; k < slots_.size(); ++k)
      slots[k + kBuiltinSlots] =
          static_cast<char*>(pointers[k]) + task * strides[k] * size_of(slots_[k]);
    for (int64_t k = 0; k < times; ++k) {
      for (const Call& call : calls_) call.kernel(call, frame);
      if (!after(task, k)) break;
    }
  }
  return frame.in_range;
}

}  // namespace imaml::cpu
