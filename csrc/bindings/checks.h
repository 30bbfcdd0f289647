// Argument checks shared by all operators on both devices. A failed check throws a RuntimeError
// that names the operator and the argument.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace imaml {

using std::int64_t;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Sizes = std::initializer_list<int64_t>;
inline constexpr int64_t kAny = -1;  // in Sizes: any length

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// Formats as in "[2, *, 3]".
inline std::string format(Sizes sizes) {
  std::ostringstream text;
  text << "[";
  for (const int64_t size : sizes) {
    if (text.tellp() > 1) text << ", ";
    size == kAny ? text << "*" : text << size;
  }
  text << "]";
  return text.str();
}

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t k = 0; k < t.dim(); ++k) text << (k ? ", " : "") << t.size(k);
  text << "]";
  return text.str();
}

inline bool has_shape(const Tensor& t, Sizes sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t k = 0;
  for (const int64_t size : sizes)
    if (const int64_t actual = t.size(k++); size != kAny && size != actual) return false;
  return true;
}

// Whether t[i] is contiguous for every i; t itself need not be.
inline bool is_contiguous_per_task(const Tensor& t) {
  int64_t step = 1;
  for (int64_t k = t.dim() - 1; k > 0; --k) {
    if (t.size(k) != 1 && t.stride(k) != step) return false;
    step *= t.size(k);
  }
  return true;
}

enum class Empty { kAllowed, kRefused };

// Checks the arguments of an operator against its first one, which is contiguous, float32 or
// float64, and determines the dtype and device of the others.
class Checker {
 public:
  Checker(const char* op, const char* name, const Tensor& first, int64_t dims, Empty empty)
      : op_(op), first_name_(name), first_(first), empty_(empty) {
    if (first.dim() != dims) fail(op, name, " must have ", dims, " dimensions, got ", shape(first));
    non_empty(name, first);
    if (first.scalar_type() != ScalarType::Float && first.scalar_type() != ScalarType::Double)
      fail(op, name, " must be float32 or float64, got ", toString(first.scalar_type()));
    contiguous(name, first);
  }

  const Checker& operand(const char* name, const Tensor& t, Sizes sizes) const {
    like_first(name, t, sizes);
    return contiguous(name, t);
  }

  const Checker& per_task(const char* name, const Tensor& t, Sizes sizes) const {
    like_first(name, t, sizes);
    if (!is_contiguous_per_task(t)) fail(op_, name, " must be contiguous within each task");
    return *this;
  }

  // [1] for a scalar, [dim] for a diagonal.
  const Checker& lam(const Tensor& t, int64_t dim) const {
    if (!has_shape(t, {1}) && !has_shape(t, {dim}))
      fail(op_, "lam must be [1] or [", dim, "], got ", shape(t));
    return operand("lam", t, {kAny});
  }

  // An operand with a fixed dtype.
  const Checker& typed(const char* name, const Tensor& t, Sizes sizes, ScalarType type) const {
    shaped(name, t, sizes);
    if (t.scalar_type() != type)
      fail(op_, name, " must be ", toString(type), ", got ", toString(t.scalar_type()));
    on_device(name, t);
    return contiguous(name, t);
  }

 private:
  void like_first(const char* name, const Tensor& t, Sizes sizes) const {
    shaped(name, t, sizes);
    if (t.scalar_type() != first_.scalar_type())
      fail(op_, name, " must have the dtype of ", first_name_, ", ", toString(first_.scalar_type()),
           ", got ", toString(t.scalar_type()));
    on_device(name, t);
  }

  void shaped(const char* name, const Tensor& t, Sizes sizes) const {
    if (!has_shape(t, sizes)) fail(op_, name, " must be ", format(sizes), ", got ", shape(t));
    non_empty(name, t);
  }

  void non_empty(const char* name, const Tensor& t) const {
    if (empty_ == Empty::kRefused && t.numel() == 0)
      fail(op_, name, " must not be empty, got ", shape(t));
  }

  void on_device(const char* name, const Tensor& t) const {
    if (t.device() != first_.device()) fail(op_, name, " must be on the device of ", first_name_);
  }

  const Checker& contiguous(const char* name, const Tensor& t) const {
    if (!t.is_contiguous()) fail(op_, name, " must be contiguous");
    return *this;
  }

  const char* op_;
  const char* first_name_;
  const Tensor& first_;
  Empty empty_;
};

// The bytes from the first to the last element of an operand. Absent and empty operands have an
// empty range.
struct MemoryRange {
  const char* name;
  const char* begin = nullptr;
  const char* end = nullptr;

  MemoryRange(const char* name, const Tensor& t)
      : name(name),
        begin(static_cast<const char*>(t.const_data_ptr())),
        end(begin + extent(t) * (t.scalar_type() == ScalarType::Double ? 8 : 4)) {}
  MemoryRange(const char* name, const std::optional<Tensor>& t)
      : MemoryRange(t ? MemoryRange(name, *t) : MemoryRange(name)) {}

  bool overlaps(const MemoryRange& other) const {
    const bool empty = begin == end || other.begin == other.end;
    return !empty && std::less<>{}(begin, other.end) && std::less<>{}(other.begin, end);
  }

 private:
  explicit MemoryRange(const char* name) : name(name) {}

  static int64_t extent(const Tensor& t) {
    int64_t elements = t.numel() == 0 ? 0 : 1;
    for (int64_t k = 0; elements != 0 && k < t.dim(); ++k)
      elements += (t.size(k) - 1) * t.stride(k);
    return elements;
  }
};

// A kernel's reads and writes are unordered, so what it writes must not overlap another operand.
inline void check_no_alias(const char* op, std::initializer_list<MemoryRange> written,
                           std::initializer_list<MemoryRange> read) {
  const auto check = [&](const MemoryRange& a, const MemoryRange& b) {
    if (a.overlaps(b)) fail(op, a.name, " is written and must not share memory with ", b.name);
  };
  for (const MemoryRange* one = written.begin(); one != written.end(); ++one) {
    for (const MemoryRange* other = one + 1; other != written.end(); ++other) check(*one, *other);
    for (const MemoryRange& other : read) check(*one, other);
  }
}

// Calls body(float{}) or body(double{}). The dtype has been checked.
template <typename Body>
void dispatch(const Tensor& t, const Body& body) {
  if (t.scalar_type() == ScalarType::Float)
    body(float{});
  else
    body(double{});
}

// An uninitialised tensor. Replaces torch's error, a C++ trace, with one line.
inline Tensor new_result(const char* op, const Tensor& like, Sizes sizes) {
  try {
    return torch::stable::new_empty(like, sizes);
  } catch (const std::exception&) {
    fail(op, "cannot allocate a result of shape ", format(sizes));
  }
}

inline Tensor new_doubles(const Tensor& like, Sizes sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}

}  // namespace imaml
