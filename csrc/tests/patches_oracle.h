// patches and their transpose, compared with the products that a convolution with one filter sums
// up.
#pragma once
#include "conv_oracle.h"
#include "cpu/patches.h"
#include "cuda/patches.cuh"

namespace imaml {

template <typename T>
struct PatchProblem {
  ConvShape shape;
  std::vector<T> images, rows;

  PatchProblem(const ConvShape& s, std::uint64_t seed) : shape(s) {
    shape.filters = 1;
    images = normal<T>(s.tasks * s.images * s.image_size(), seed);
    rows = normal<T>(s.tasks * s.images * s.patches_size(), seed + 1);
  }
};

template <typename T>
struct PatchResults {
  std::vector<T> rows, images;
  bool same(const PatchResults& o) const {
    return same_bits(rows, o.rows) && same_bits(images, o.images);
  }
};

// Calls run(images, rows out) and transpose(rows, images out), on results initialised to NaN.
template <typename T, typename Run, typename Transpose>
PatchResults<T> run_patches_by(const PatchProblem<T>& problem, std::size_t offset, const Run& run,
                               const Transpose& transpose) {
  PatchResults<T> got{std::vector<T>(problem.rows.size(), T(NAN)),
                      std::vector<T>(problem.images.size(), T(NAN))};
  Operands operands(offset);
  run(operands.in(problem.images), operands.out(got.rows));
  transpose(operands.in(problem.rows), operands.out(got.images));
  operands.copy_back();
  return got;
}

template <typename T, typename ParallelFor = cpu::Serial>
PatchResults<T> run_patches(const PatchProblem<T>& problem, const ParallelFor& parallel_for = {},
                            std::size_t offset = 0) {
  const ConvShape& s = problem.shape;
  return run_patches_by(
      problem, offset,
      [&](const T* images, T* rows) { cpu::patches(s, images, rows, parallel_for); },
      [&](const T* rows, T* images) { cpu::patches_transpose(s, rows, images, parallel_for); });
}

template <typename T>
PatchResults<T> run_patches_on_cuda(const PatchProblem<T>& problem, std::size_t offset = 0) {
  const ConvShape& s = problem.shape;
  return run_patches_by(
      problem, offset, [&](const T* images, T* rows) { cuda::patches(s, images, rows, nullptr); },
      [&](const T* rows, T* images) { cuda::patches_transpose(s, rows, images, nullptr); });
}

template <typename T>
void check_patches(const PatchProblem<T>& problem, const PatchResults<T>& got) {
  std::vector<T> rows(problem.rows.size());
  Sums images(0, static_cast<int64_t>(problem.images.size()));
  for (int64_t task = 0; task < problem.shape.tasks; ++task)
    for_products(problem.shape, task, [&](int64_t pixel, int64_t in_image, int64_t tap) {
      const std::size_t in_rows = at(pixel * problem.shape.patch_size() + tap);
      rows[in_rows] = problem.images[at(in_image)];
      images.add(in_image, double(problem.rows[in_rows]));
    });
  expect(same_bits(got.rows, rows), "patches are not the windows of the image");
  expect_sums(got.images, images, "the transpose of patches");
}

}  // namespace imaml
