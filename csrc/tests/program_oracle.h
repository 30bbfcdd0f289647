// The instructions of programs as plain loops in long double, and random layouts for them.
#pragma once
#include <map>

#include "cpu/program.h"
#include "fuzz.h"
#include "operands.h"

namespace imaml {

using cpu::Instruction;
using cpu::Operand;

// What an element should be: `want`, within rounding relative to `scale`.
struct Expected {
  long double want = 0, scale = 0;
  bool overflows = false;  // a finite term of a sum, or a factor, may overflow
};

inline Expected exactly(long double want) { return {want, std::abs(want)}; }

// Whether a factor may be infinite in float32, and the product with the other one finite.
inline bool factor_overflows(long double factor) {
  return std::isfinite(factor) && std::abs(factor) > std::numeric_limits<float>::max() / 2;
}

template <typename T>
constexpr cpu::DType kDType = sizeof(T) == 4 ? cpu::DType::kFloat32 : cpu::DType::kFloat64;

// x, y, z are operands 1, 2, 3; s the first scalar, rounded to T.
inline Expected map_oracle(const std::string& name, long double x, long double y, long double z,
                           long double s) {
  using std::isnan;
  const long double nan = std::numeric_limits<long double>::quiet_NaN();
  const std::map<std::string, std::function<Expected()>> functions = {
      {"copy", [=] { return exactly(x); }},
      {"neg", [=] { return exactly(-x); }},
      {"abs", [=] { return exactly(std::abs(x)); }},
      {"sign", [=] { return exactly(x > 0   ? 1
                                    : x < 0 ? -1
                                            : 0); }},
      {"exp", [=] { return exactly(std::exp(x)); }},
      {"log", [=] { return exactly(std::log(x)); }},
      {"log1p", [=] { return exactly(std::log1p(x)); }},
      {"expm1", [=] { return exactly(std::expm1(x)); }},
      {"sqrt", [=] { return exactly(std::sqrt(x)); }},
      {"rsqrt", [=] { return exactly(1 / std::sqrt(x)); }},
      {"reciprocal", [=] { return exactly(1 / x); }},
      {"sin", [=] { return exactly(std::sin(x)); }},
      {"cos", [=] { return exactly(std::cos(x)); }},
      {"tanh", [=] { return exactly(std::tanh(x)); }},
      {"sigmoid", [=] { return exactly(1 / (1 + std::exp(-x))); }},
      {"erf", [=] { return exactly(std::erf(x)); }},
      {"relu", [=] { return exactly(isnan(x) ? nan
                                    : x > 0  ? x
                                             : 0); }},
      {"floor", [=] { return exactly(std::floor(x)); }},
      {"ceil", [=] { return exactly(std::ceil(x)); }},
      {"logical_not", [=] { return exactly(x == 0); }},
      {"isnan", [=] { return exactly(isnan(x)); }},
      {"add", [=] { return Expected{x + s * y, std::abs(x) + std::abs(s * y)}; }},
      {"sub", [=] { return Expected{x - s * y, std::abs(x) + std::abs(s * y)}; }},
      {"mul", [=] { return exactly(x * y); }},
      {"div", [=] { return exactly(x / y); }},
      {"pow", [=] { return exactly(std::pow(x, y)); }},
      {"maximum", [=] { return exactly(isnan(x) || isnan(y) ? nan : std::max(x, y)); }},
      {"minimum", [=] { return exactly(isnan(x) || isnan(y) ? nan : std::min(x, y)); }},
      {"eq", [=] { return exactly(x == y); }},
      {"ne", [=] { return exactly(!(x == y)); }},
      {"lt", [=] { return exactly(x < y); }},
      {"le", [=] { return exactly(x <= y); }},
      {"gt", [=] { return exactly(x > y); }},
      {"ge", [=] { return exactly(x >= y); }},
      {"logical_and", [=] { return exactly(x != 0 && y != 0); }},
      {"logical_or", [=] { return exactly(x != 0 || y != 0); }},
      {"threshold_backward", [=] { return exactly(y <= s ? 0 : x); }},
      {"tanh_backward",
       [=] {
         return Expected{x * (1 - y * y), std::abs(x) * (1 + y * y), factor_overflows(y * y)};
       }},
      {"sigmoid_backward",
       [=] {
         return Expected{x * y * (1 - y), std::abs(x * y) * (1 + std::abs(y)),
                         factor_overflows(x * y)};
       }},
      {"where", [=] { return exactly(x != 0 ? y : z); }}};
  return functions.at(name)();
}

// Calls visit(index) for every index of the loops, in order.
template <typename Visit>
void for_indices(const std::vector<int64_t>& sizes, const Visit& visit) {
  std::vector<int64_t> index(sizes.size());
  const auto loop = [&](const auto& self, std::size_t k) -> void {
    if (k == sizes.size()) return visit(index);
    for (index[k] = 0; index[k] < sizes[k]; ++index[k]) self(self, k + 1);
  };
  loop(loop, 0);
}

inline int64_t element(const Operand& operand, const std::vector<int64_t>& index) {
  int64_t at = operand.offset;
  for (std::size_t k = 0; k < index.size(); ++k) at += index[k] * operand.strides[k];
  return at;
}

// The elements of the result's slot that one task writes. `slots` are its operands' slots, which
// begin at operand 0's. Sets `in_range`.
template <typename T>
std::map<int64_t, Expected> expected(const Instruction& one,
                                     const std::vector<std::vector<T>>& slots, bool& in_range) {
  using limits = std::numeric_limits<T>;
  std::map<int64_t, Expected> result;
  const auto value = [&](std::size_t operand, const std::vector<int64_t>& index) {
    return operand < one.operands.size()
               ? static_cast<long double>(slots[operand][at(element(one.operands[operand], index))])
               : 0;
  };
  const long double s = one.scalars.empty() ? 0 : static_cast<T>(one.scalars[0]);
  const bool is_sum = one.name == "sum", is_matmul = one.name == "matmul";
  const bool is_extremum = one.name == "amax" || one.name == "amin";
  if (is_sum || is_matmul || is_extremum) {
    std::vector<int64_t> kept = one.sizes;
    for (std::size_t k = 0; k < kept.size(); ++k)
      if (one.operands[0].strides[k] == 0) kept[k] = 1;
    const long double infinity = std::numeric_limits<long double>::infinity();
    for_indices(kept, [&](const std::vector<int64_t>& index) {
      result[element(one.operands[0], index)] =
          is_extremum ? exactly(one.name == "amax" ? -infinity : infinity)
                      : exactly(value(3, index));
    });
  }
  for_indices(one.sizes, [&](const std::vector<int64_t>& index) {
    int64_t to = element(one.operands[0], index);
    const long double x = value(1, index);
    if (is_sum || is_matmul) {
      const long double term = is_sum ? x : x * value(2, index);
      result[to].want += term;
      result[to].scale += std::abs(term);
      result[to].overflows |= std::isfinite(term) && !(std::abs(term) < limits::max() / 5000);
    } else if (is_extremum) {
      const long double old = result[to].want;
      const bool better = one.name == "amax" ? x > old : x < old;
      if (std::isnan(x) || better) result[to] = exactly(x);
    } else if (one.name == "gather" || one.name.rfind("scatter_", 0) == 0) {
      const bool gathers = one.name == "gather";
      const long double where = gathers ? value(2, index) : x;
      const bool valid = where >= 0 && where < static_cast<long double>(one.integers[1]);
      const int64_t step = valid ? static_cast<int64_t>(where) * one.integers[0] : 0;
      in_range = in_range && valid;
      if (gathers) {
        const int64_t from = element(one.operands[1], index) + step;
        result[to] = exactly(valid ? static_cast<long double>(slots[1][at(from)]) : 0);
      } else if (valid) {
        to += step;
        if (!result.count(to)) result[to] = exactly(slots[0][at(to)]);
        const Expected term = exactly(value(2, index));
        result[to] = one.name == "scatter_set"
                         ? term
                         : Expected{result[to].want + term.want, result[to].scale + term.scale,
                                    result[to].overflows || !(term.scale < limits::max() / 5000)};
      }
    } else {
      result[to] = map_oracle(one.name, x, value(2, index), value(3, index), s);
    }
  });
  return result;
}

// Skips what may overflow on the way to a finite value.
template <typename T>
void expect_element(T got, const Expected& expected, const std::string& what) {
  using limits = std::numeric_limits<T>;
  constexpr long double ulps = sizeof(T) == 4 ? 16 : 64;
  const long double want = expected.want, scale = expected.scale;
  if (expected.overflows) return;
  if (std::isnan(want)) return expect(std::isnan(got), what.c_str());
  if (std::isinf(want)) return expect(static_cast<long double>(got) == want, what.c_str());
  if (!(scale < limits::max() / 4)) return;
  const long double error = std::abs(static_cast<long double>(got) - want);
  expect(error <= ulps * limits::epsilon() * scale + 2 * limits::min(), what.c_str());
}

template <typename T>
struct ProgramProblem {
  int64_t tasks = 1;
  Instruction one = {};                    // operand k in slot k + 2
  std::vector<std::vector<T>> slots = {};  // [tasks, stride]
  std::vector<int64_t> strides = {};       // 0: shared by all tasks
  bool in_arena = false;                   // copies the operands to the arena and the result back

  int64_t extent(std::size_t k) const {
    const Operand& operand = one.operands[k];
    int64_t last = operand.offset;
    for (std::size_t n = 0; n < one.sizes.size(); ++n)
      last += std::max<int64_t>(one.sizes[n] - 1, 0) * operand.strides[n];
    const bool indexed = one.name == "gather" ? k == 1 : !one.integers.empty() && k == 0;
    return last + 1 + (indexed ? (one.integers[1] - 1) * one.integers[0] : 0);
  }

  std::vector<std::vector<T>> of_task(int64_t task) const {
    std::vector<std::vector<T>> result;
    for (std::size_t k = 0; k < slots.size(); ++k)
      result.push_back(part(slots[k], strides[k] == 0 ? 0 : task, extent_or_stride(k)));
    return result;
  }
  int64_t extent_or_stride(std::size_t k) const { return strides[k] == 0 ? extent(k) : strides[k]; }

  std::vector<Instruction> instructions(int64_t& arena) const {
    arena = 0;
    if (!in_arena) return {one};
    std::vector<Instruction> all;
    Instruction moved = one;
    for (std::size_t k = 0; k < slots.size(); ++k) {
      all.push_back({"copy", {extent(k)}, {{0, arena, {1}}, {int64_t(k) + 2, 0, {1}}}, {}, {}});
      moved.operands[k].slot = 0;
      moved.operands[k].offset += arena;
      arena += extent(k);
    }
    all.push_back(moved);
    all.push_back({"copy", {extent(0)}, {{2, 0, {1}}, {0, 0, {1}}}, {}, {}});
    return all;
  }
};

// Slot 2 after the run.
template <typename T, typename ParallelFor>
std::vector<T> run_program(const ProgramProblem<T>& problem, const ParallelFor& parallel_for,
                           std::size_t offset, bool& in_range) {
  std::vector<std::vector<T>> slots = problem.slots;
  Operands operands(offset);
  std::vector<void*> pointers;
  for (std::size_t k = 0; k < slots.size(); ++k)
    pointers.push_back(k == 0 ? operands.out(slots[0])
                              : const_cast<T*>(operands.in(problem.slots[k])));
  int64_t arena = 0;
  const std::vector<Instruction> instructions = problem.instructions(arena);
  const cpu::Program program(kDType<T>, arena, {}, std::vector<cpu::DType>(slots.size(), kDType<T>),
                             instructions);
  for (std::size_t k = 0; k < slots.size(); ++k)
    expect(program.extents()[k] <= problem.extent(k), "the extent is too large");
  in_range = program.run(problem.tasks, pointers, problem.strides, parallel_for);
  operands.copy_back();
  return slots[0];
}

// Checks every element of slot 2.
template <typename T>
void check_program(const ProgramProblem<T>& problem, const std::vector<T>& got, bool in_range) {
  bool all_in_range = true;
  for (int64_t task = 0; task < problem.tasks; ++task) {
    const auto want = expected(problem.one, problem.of_task(task), all_in_range);
    for (int64_t i = 0; i < problem.strides[0]; ++i) {
      const std::size_t k = at(task * problem.strides[0] + i);
      if (const auto found = want.find(i); found != want.end())
        expect_element(got[k], found->second, problem.one.name);
      else
        expect(!std::memcmp(&got[k], &problem.slots[0][k], sizeof(T)),
               "an element that is not a result has changed");
    }
  }
  expect(in_range == all_in_range, "an index is out of range and not reported, or the reverse");
}

}  // namespace imaml
