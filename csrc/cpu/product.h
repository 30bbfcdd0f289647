// batched_product on the CPU, the reference for the CUDA kernel: layers do not use it. Terms are
// added in order.
#pragma once
#include "product_shape.h"

namespace imaml::cpu {

template <typename T, typename ParallelFor>
void batched_product(const ProductShape& s, const T* a, const T* b, T* y,
                     const ParallelFor& parallel_for) {
  const int64_t a_row = s.transpose_a ? 1 : s.terms, a_term = s.transpose_a ? s.rows : 1;
  const int64_t b_term = s.transpose_b ? 1 : s.columns, b_column = s.transpose_b ? s.terms : 1;
  parallel_for(s.tasks * s.rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* const left = a + row / s.rows * s.a_stride + row % s.rows * a_row;
      const T* const right = b + row / s.rows * s.b_stride;
      T* const out = y + row * s.columns;
      for (int64_t j = 0; j < s.columns; ++j) out[j] = 0;
      for (int64_t k = 0; k < s.terms; ++k)
        for (int64_t j = 0; j < s.columns; ++j)
          out[j] += left[k * a_term] * right[k * b_term + j * b_column];
    }
  });
}

}  // namespace imaml::cpu
