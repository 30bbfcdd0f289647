// Programs: the accuracy of the functions over their whole range, and products and reductions at
// sizes around every boundary.
#include <bit>

#include "program_oracle.h"

namespace imaml {
namespace {

constexpr const char* kFunctions[] = {"exp", "expm1", "log", "log1p", "tanh", "sigmoid"};

// The result of an elementwise function of one array.
template <typename T>
std::vector<T> map(const char* name, const std::vector<T>& x) {
  const auto count = static_cast<int64_t>(x.size());
  std::vector<T> y(x.size());
  const cpu::Program program(kDType<T>, 0, {}, {kDType<T>, kDType<T>},
                             {{name, {count}, {{2, 0, {1}}, {3, 0, {1}}}, {}, {}}});
  program.run(1, {y.data(), const_cast<T*>(x.data())}, {0, 0}, cpu::Serial{});
  return y;
}

// The error in units in the last place of `want`, which may be subnormal.
template <typename T>
long double ulps(T got, long double want) {
  using limits = std::numeric_limits<T>;
  const long double magnitude = std::max<long double>(std::abs(want), limits::min());
  return std::abs(got - want) / std::ldexp(limits::epsilon(), std::ilogb(magnitude));
}

template <typename T>
void check_accuracy(const std::vector<T>& x, long double most) {
  for (const char* name : kFunctions) {
    context = std::string(name) + (sizeof(T) == 4 ? "<float>" : "<double>");
    const std::vector<T> y = map(name, x);
    long double worst = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const long double want = map_oracle(name, x[i], 0, 0, 0).want;
      if (std::isnan(want))
        expect(std::isnan(y[i]), "must be NaN");
      else if (std::isinf(static_cast<T>(want)) || std::isinf(y[i]))
        expect(y[i] == static_cast<T>(want), "must be infinite");
      // 1 / (1 + exp(-x)) is 0 where exp(-x) overflows.
      else if (std::abs(want) > std::numeric_limits<T>::min() || name != std::string("sigmoid"))
        worst = std::max(worst, ulps(y[i], want));
    }
    if (worst > most)
      std::fprintf(stderr, "%s: %Lf units in the last place\n", context.c_str(), worst);
    expect(worst <= most, "inaccurate");
  }
}

void test_functions_are_accurate_over_their_whole_range() {
  std::vector<float> floats;
  for (std::uint64_t bits = 0; bits < 1ull << 32; bits += 60013)
    floats.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(bits)));
  std::vector<double> doubles;
  Draw draw(1);
  for (int i = 0; i < 30000; ++i) {
    doubles.push_back(draw.value<double>(kBits));
    doubles.push_back(draw.value<double>(kNormal) * 200);
    doubles.push_back(1 + draw.value<double>(kNormal) / 10);
    doubles.push_back(std::ldexp(draw.value<double>(kNormal), -int(draw.from(0, 60))));
  }
  for (const double x : {710.0, 709.78, -745.1, -745.2, 88.72, 88.73, -103.9, -104.0, 0.0, -0.0}) {
    floats.push_back(static_cast<float>(x));
    doubles.push_back(x);
  }
  check_accuracy(floats, 4);
  check_accuracy(doubles, 4);
}

template <typename T>
void check(ProgramProblem<T> problem, std::uint64_t seed) {
  context = problem.one.name + name_of<T>("", problem.one.sizes[0], problem.one.sizes[1]);
  problem.tasks = 3;
  for (std::size_t k = 0; k < problem.one.operands.size(); ++k) {
    problem.strides.push_back(problem.extent(k));
    problem.slots.push_back(normal<T>(3 * problem.strides.back(), seed + k));
  }
  bool in_range = true;
  check_program(problem, run_program(problem, Threads{2}, 0, in_range), in_range);
}

template <typename T>
void test_products_around_the_boundaries_of_tiles() {
  constexpr int64_t rows[] = {1, 3, 6, 7}, columns[] = {1, 7, 16, 17, 40};
  for (const int64_t m : rows)
    for (const int64_t n : columns)
      for (const int64_t k : {1, 8, 33})
        for (int layout = 0; layout < 8; ++layout) {
          const auto pick = [&](int bit, int64_t first, int64_t second) {
            return layout >> bit & 1 ? second : first;
          };
          const Operand result{2, 0, {pick(0, n, 1), pick(0, 1, m), 0}};
          const Operand a{3, 0, {pick(1, k, 1), 0, pick(1, 1, m)}};
          const Operand b{4, 0, {0, pick(2, 1, k), pick(2, n, 1)}}, c{5, 0, {0, 1, 0}};
          check<T>({.one = {"matmul", {m, n, k}, {result, a, b, c}, {}, {}}}, at(m * n * k));
        }
}

template <typename T>
void test_reductions_around_the_boundaries_of_lanes() {
  for (const char* name : {"sum", "amax", "amin"})
    for (const int64_t rows : {1, 2, 17})
      for (const int64_t columns : {1, 3, 4, 5, 15, 16, 17, 20, 33, 1000}) {
        const Operand from{3, 0, {columns, 1}};
        for (const Operand& to :
             {Operand{2, 0, {0, 0}}, {2, 0, {1, 0}}, {2, 0, {0, 1}}, {2, 0, {0, 3}}})
          check<T>({.one = {name, {rows, columns}, {to, from}, {}, {}}}, at(rows * columns));
      }
}

// In T, 1e4 terms of 0.1 lose four digits.
void test_sums_of_floats_are_accumulated_in_double() {
  context = "sum<float>";
  std::vector<float> x(10000, 0.1f), y(1);
  for (const bool columns : {false, true}) {
    const int64_t width = columns ? 4 : 1;
    y.resize(at(width));
    const cpu::Program program(
        cpu::DType::kFloat32, 0, {}, {cpu::DType::kFloat32, cpu::DType::kFloat32},
        {{"sum", {10000 / width, width}, {{2, 0, {0, columns}}, {3, 0, {width, 1}}}, {}, {}}});
    program.run(1, {y.data(), x.data()}, {0, 0}, cpu::Serial{});
    for (const float sum : y)
      expect(sum == static_cast<float>(0.1f * (10000.0 / double(width))), "inaccurate");
  }
}

}  // namespace

void test_program() {
  test_functions_are_accurate_over_their_whole_range();
  test_products_around_the_boundaries_of_tiles<float>();
  test_products_around_the_boundaries_of_tiles<double>();
  test_reductions_around_the_boundaries_of_lanes<float>();
  test_reductions_around_the_boundaries_of_lanes<double>();
  test_sums_of_floats_are_accumulated_in_double();
}

}  // namespace imaml
