// The layers with weights for each task, against their formulas summed one by one in float64.
#include "conv_oracle.h"
#include "norm_oracle.h"

namespace imaml {
namespace {

template <typename T>
void test_conv(const ConvShape& s) {
  context = describe(s, sizeof(T) == 4 ? "float" : "double");
  for (const bool biased : {false, true}) {
    const ConvProblem<T> problem(s, /*gap=*/biased ? 5 : 0, 1);
    const ConvResults<T> serial = run_conv(problem, biased);
    for (int64_t task = 0; task < s.tasks; ++task) check_conv(problem, biased, serial, task);
    expect(run_conv(problem, biased, 5, Threads{3}).same(serial), "threads change the bits");
  }
}

template <typename T>
void test_conv_of_equal_values(const ConvShape& s) {
  context = describe(s, sizeof(T) == 4 ? "equal float" : "equal double");
  ConvProblem<T> problem(s, 0, 1);
  std::fill(problem.x.begin(), problem.x.end(), T(0.1));
  std::fill(problem.g.begin(), problem.g.end(), T(0.3));
  check_conv(problem, false, run_conv(problem, false), 0);
}

template <typename T>
void test_norm(const NormShape& s, bool relu) {
  context = std::string(sizeof(T) == 4 ? "norm<float> " : "norm<double> ") +
            std::to_string(s.tasks) + " " + std::to_string(s.rows) + " " +
            std::to_string(s.channels) + (relu ? " relu" : "");
  const NormProblem<T> problem(s, relu, 0);
  const NormResults<T> serial = run_norm(problem);
  for (int64_t task = 0; task < s.tasks; ++task)
    for (int64_t channel = 0; channel < s.channels; ++channel)
      check_norm(problem, serial, task, channel);
  expect(run_norm(problem, 5, Threads{3}).same(serial), "threads change the bits");
}

}  // namespace

void test_layers() {
  // Around a tile's lanes (8 doubles, 16 floats) and rows (6), and with fewer channels than rows.
  for (const int64_t channels : {1, 3, 6, 7, 17})
    for (const int64_t filters : {1, 8, 15, 33}) {
      test_conv<float>(shape_of(2, 3, 5, 4, channels, filters, 3, 3, 2, 2, 1, 1));
      test_conv<double>(shape_of(2, 3, 5, 4, channels, filters, 3, 3, 2, 2, 1, 1));
    }
  // Every remainder of the pixels by a tile's rows.
  for (int64_t images = 1; images <= 7; ++images)
    test_conv<float>(shape_of(1, images, 3, 3, 4, 4, 3, 3, 1, 1, 1, 1));
  // More pixels than the weight gradient takes at a time, in one image and in many.
  test_conv<float>(shape_of(1, 2, 12, 11, 6, 5, 3, 3, 1, 1, 1, 1));
  test_conv<float>(shape_of(1, 60, 4, 4, 2, 5, 3, 3, 2, 2, 1, 1));
  // Even and uneven kernels, pointwise ones, strides beyond the kernel and beyond the image,
  // padding beyond the kernel, a kernel that is as large as the image.
  for (const auto& s :
       {shape_of(3, 2, 6, 5, 3, 4, 2, 3, 1, 2, 0, 1), shape_of(2, 2, 7, 7, 3, 4, 1, 1, 1, 1, 0, 0),
        shape_of(2, 2, 7, 5, 3, 4, 1, 2, 3, 3, 0, 0), shape_of(1, 2, 3, 3, 7, 4, 2, 2, 5, 4, 1, 0),
        shape_of(1, 2, 2, 3, 2, 4, 2, 2, 2, 1, 3, 2),
        shape_of(2, 3, 4, 4, 5, 9, 4, 4, 1, 1, 0, 0)}) {
    test_conv<float>(s);
    test_conv<double>(s);
  }
  test_conv_of_equal_values<float>(shape_of(1, 60, 7, 7, 2, 3, 3, 3, 1, 1, 1, 1));
  test_conv_of_equal_values<double>(shape_of(1, 60, 7, 7, 2, 3, 3, 3, 1, 1, 1, 1));
  for (const bool relu : {false, true})
    for (const int64_t channels : {1, 15, 16, 17, 40})
      for (const int64_t rows : {2, 5, 64, 65, 130}) {
        test_norm<float>({.tasks = 3, .rows = rows, .channels = channels}, relu);
        test_norm<double>({.tasks = 3, .rows = rows, .channels = channels}, relu);
      }
}

}  // namespace imaml
