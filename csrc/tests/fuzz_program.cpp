// Single instructions of random form, on random layouts and values.
#include "program_oracle.h"

namespace imaml {
namespace {

constexpr const char* kUnary[] = {"copy",  "neg",         "abs",     "sign",  "exp",        "log",
                                  "log1p", "expm1",       "sqrt",    "rsqrt", "reciprocal", "sin",
                                  "cos",   "tanh",        "sigmoid", "erf",   "relu",       "floor",
                                  "ceil",  "logical_not", "isnan"};
constexpr const char* kBinary[] = {"add",
                                   "sub",
                                   "mul",
                                   "div",
                                   "pow",
                                   "maximum",
                                   "minimum",
                                   "eq",
                                   "ne",
                                   "lt",
                                   "le",
                                   "gt",
                                   "ge",
                                   "logical_and",
                                   "logical_or",
                                   "threshold_backward",
                                   "tanh_backward",
                                   "sigmoid_backward"};

std::vector<int64_t> drawn_sizes(Draw& draw, int64_t least, int64_t most, int64_t elements) {
  std::vector<int64_t> sizes(at(draw.from(least, most)));
  for (int64_t& size : sizes) {
    const int64_t dim = draw.chance(0.2) ? 1 : draw.chance(0.03) ? 0 : draw.from(1, 70);
    size = std::min(dim, std::max<int64_t>(elements, 1));
    elements /= std::max<int64_t>(size, 1);
  }
  std::shuffle(sizes.begin(), sizes.end(), std::mt19937_64(draw.seed()));
  return sizes;
}

// A layout without overlaps, in any order of the loops, but with stride 0 in the loops that
// `absent` selects.
template <typename Absent>
Operand drawn_operand(Draw& draw, int64_t slot, const std::vector<int64_t>& sizes,
                      const Absent& absent) {
  Operand operand{slot, draw.from(0, 3), std::vector<int64_t>(sizes.size())};
  std::vector<std::size_t> order(sizes.size());
  for (std::size_t k = 0; k < order.size(); ++k) order[k] = order.size() - 1 - k;
  if (draw.chance(0.4)) std::shuffle(order.begin(), order.end(), std::mt19937_64(draw.seed()));
  int64_t step = draw.chance(0.2) ? draw.from(1, 3) : 1;
  for (const std::size_t k : order) {
    if (absent(k)) continue;
    operand.strides[k] = step;
    step *= std::max<int64_t>(sizes[k], 1);
    if (draw.chance(0.2)) step += draw.from(1, 5);
  }
  return operand;
}

template <typename T>
void draw_slots(Draw& draw, ProgramProblem<T>& problem) {
  for (std::size_t k = 0; k < problem.one.operands.size(); ++k) {
    const bool shared = k > 0 && draw.chance(0.2);
    const int64_t extent = problem.extent(k);
    problem.strides.push_back(shared ? 0 : extent + draw.from(0, 3));
    const int64_t count = shared ? extent : problem.tasks * problem.strides.back();
    problem.slots.push_back(normal<T>(count, draw.seed()));
    draw.corrupt(problem.slots.back().data(), count);
  }
}

template <typename T>
void run_and_check(Draw& draw, ProgramProblem<T>& problem) {
  problem.in_arena = draw.chance(0.3);
  context = problem.one.name + (sizeof(T) == 4 ? "<float>[" : "<double>[");
  for (const int64_t size : problem.one.sizes) context += std::to_string(size) + ",";
  context += "]";
  ++tried["program: " + problem.one.name];
  bool in_range = true, other_in_range = true;
  const std::vector<T> serial = run_program(problem, cpu::Serial{}, draw.offset(), in_range);
  check_program(problem, serial, in_range);
  on_threads(draw, [&](int, const Threads& pool) {
    return same_bits(run_program(problem, pool, draw.offset(), other_in_range), serial) &&
           in_range == other_in_range;
  });
}

}  // namespace

template <typename T>
void fuzz_map(Draw& draw) {
  ProgramProblem<T> problem{.tasks = draw.from(1, 4)};
  const int64_t operands = draw.from(1, 3);
  problem.one.name = operands == 1   ? draw.one_of(kUnary)
                     : operands == 2 ? draw.one_of(kBinary)
                                     : "where";
  const std::string& name = problem.one.name;
  if (name == "add" || name == "sub" || name == "threshold_backward")
    problem.one.scalars = {draw.one_of({1.0, -0.3, 0.0, 2.5})};
  problem.one.sizes = drawn_sizes(draw, 0, 6, 300);
  for (int64_t k = 0; k <= operands; ++k) {
    const bool repeats = k > 0 && draw.chance(0.4);
    problem.one.operands.push_back(drawn_operand(
        draw, k + 2, problem.one.sizes, [&](std::size_t) { return repeats && draw.chance(0.5); }));
  }
  draw_slots(draw, problem);
  run_and_check(draw, problem);
}

template <typename T>
void fuzz_reduction(Draw& draw) {
  ProgramProblem<T> problem{.tasks = draw.from(1, 4)};
  problem.one.name = draw.one_of({"sum", "amax", "amin"});
  problem.one.sizes = drawn_sizes(draw, 0, 6, 1000);
  std::vector<bool> reduced;
  for (std::size_t k = 0; k < problem.one.sizes.size(); ++k) reduced.push_back(draw.chance(0.5));
  problem.one.operands = {
      drawn_operand(draw, 2, problem.one.sizes, [&](std::size_t k) { return reduced[k]; }),
      drawn_operand(draw, 3, problem.one.sizes, [&](std::size_t) { return draw.chance(0.05); })};
  draw_slots(draw, problem);
  run_and_check(draw, problem);
}

template <typename T>
void fuzz_product(Draw& draw) {
  ProgramProblem<T> problem{.tasks = draw.from(1, 4)};
  problem.one.name = "matmul";
  std::vector<int64_t>& sizes = problem.one.sizes;
  sizes = drawn_sizes(draw, 3, 6, 5000);
  const std::size_t k = sizes.size() - 1, n = k - 1, m = k - 2;
  const bool repeats = draw.chance(0.5);
  const auto batch = [&](std::size_t loop) { return repeats && loop < m && draw.chance(0.5); };
  problem.one.operands = {
      drawn_operand(draw, 2, sizes, [&](std::size_t loop) { return loop == k; }),
      drawn_operand(draw, 3, sizes, [&](std::size_t loop) { return loop == n || batch(loop); }),
      drawn_operand(draw, 4, sizes, [&](std::size_t loop) { return loop == m || batch(loop); })};
  if (draw.chance(0.5)) {
    const bool bias = draw.chance(0.5);
    problem.one.operands.push_back(drawn_operand(draw, 5, sizes, [&](std::size_t loop) {
      return loop == k || (bias && loop != n) || batch(loop);
    }));
  }
  draw_slots(draw, problem);
  run_and_check(draw, problem);
}

template <typename T>
void fuzz_indexing(Draw& draw) {
  ProgramProblem<T> problem{.tasks = draw.from(1, 4)};
  Instruction& one = problem.one;
  one.name = draw.one_of({"gather", "scatter_set", "scatter_add"});
  one.sizes = drawn_sizes(draw, 1, 5, 200);
  const std::size_t indexed = at(draw.from(0, int64_t(one.sizes.size()) - 1));
  const int64_t source = one.name == "gather" ? 1 : 0, index = one.name == "gather" ? 2 : 1;
  // The source's layout, with the indexed dimension in place of the loop.
  std::vector<int64_t> source_sizes = one.sizes;
  source_sizes[indexed] = draw.from(1, 30);
  for (int64_t k = 0; k < 3; ++k)
    one.operands.push_back(drawn_operand(draw, k + 2, k == source ? source_sizes : one.sizes,
                                         [](std::size_t) { return false; }));
  int64_t& stride = one.operands[at(source)].strides[indexed];
  one.integers = {stride, source_sizes[indexed]};
  stride = 0;
  draw_slots(draw, problem);
  const bool valid = draw.chance(0.7);
  for (T& value : problem.slots[at(index)])
    value = !valid && draw.chance(0.1) ? draw.value<T>(kBits)
                                       : static_cast<T>(draw.from(0, one.integers[1] - valid));
  run_and_check(draw, problem);
}

#define IMAML_DEFINE(T)                   \
  template void fuzz_map<T>(Draw&);       \
  template void fuzz_reduction<T>(Draw&); \
  template void fuzz_product<T>(Draw&);   \
  template void fuzz_indexing<T>(Draw&);
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace imaml
