// batched_product, compared with sums in double.
#pragma once
#include "conv_oracle.h"
#include "cpu/product.h"
#include "cuda/product.cuh"

namespace imaml {

template <typename T>
struct ProductProblem {
  ProductShape shape;
  std::vector<T> a, b;

  // `gap` elements separate the tasks of an operand.
  ProductProblem(int64_t tasks, int64_t rows, int64_t columns, int64_t terms, bool transpose_a,
                 bool transpose_b, int64_t gap, std::uint64_t seed)
      : shape{tasks,       rows,       columns, terms, rows * terms + gap, terms * columns + gap,
              transpose_a, transpose_b},
        a(normal<T>(tasks * shape.a_stride, seed)),
        b(normal<T>(tasks * shape.b_stride, seed + 1)) {}

  ProductProblem only(int64_t task) const {
    ProductProblem one = *this;
    one.shape.tasks = 1;
    one.a =
        std::vector<T>(a.begin() + task * shape.a_stride, a.begin() + (task + 1) * shape.a_stride);
    one.b =
        std::vector<T>(b.begin() + task * shape.b_stride, b.begin() + (task + 1) * shape.b_stride);
    return one;
  }
  int64_t results() const { return shape.rows * shape.columns; }
};

template <typename T>
std::string describe(const ProductProblem<T>& problem) {
  const ProductShape& s = problem.shape;
  std::string text = sizeof(T) == 4 ? "product<float>" : "product<double>";
  for (const int64_t size : {s.tasks, s.rows, s.columns, s.terms})
    text.append(" ").append(std::to_string(size));
  return text.append(s.transpose_a ? " T" : " N").append(s.transpose_b ? "T" : "N");
}

// Calls run(a, b, y), on a result initialised to NaN.
template <typename T, typename Run>
std::vector<T> run_product_by(const ProductProblem<T>& problem, std::size_t offset,
                              const Run& run) {
  std::vector<T> y(at(problem.shape.tasks * problem.results()), T(NAN));
  Operands operands(offset);
  run(operands.in(problem.a), operands.in(problem.b), operands.out(y));
  operands.copy_back();
  return y;
}

template <typename T, typename ParallelFor = cpu::Serial>
std::vector<T> run_product(const ProductProblem<T>& problem, const ParallelFor& parallel_for = {},
                           std::size_t offset = 0) {
  return run_product_by(problem, offset, [&](const T* a, const T* b, T* y) {
    cpu::batched_product(problem.shape, a, b, y, parallel_for);
  });
}

template <typename T>
std::vector<T> run_product_on_cuda(const ProductProblem<T>& problem, std::size_t offset = 0) {
  return run_product_by(problem, offset, [&](const T* a, const T* b, T* y) {
    cuda::batched_product(problem.shape, a, b, y, nullptr);
  });
}

template <typename T>
void check_product(const ProductProblem<T>& problem, const std::vector<T>& got) {
  const ProductShape& s = problem.shape;
  for (int64_t task = 0; task < s.tasks; ++task) {
    Sums want(task * problem.results(), problem.results());
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t j = 0; j < s.columns; ++j)
        for (int64_t k = 0; k < s.terms; ++k) {
          const int64_t in_a = s.transpose_a ? k * s.rows + i : i * s.terms + k;
          const int64_t in_b = s.transpose_b ? j * s.terms + k : k * s.columns + j;
          want.add(want.first + i * s.columns + j,
                   double(problem.a[at(task * s.a_stride + in_a)]) *
                       double(problem.b[at(task * s.b_stride + in_b)]));
        }
    expect_sums(got, want, "a product");
  }
}

}  // namespace imaml
