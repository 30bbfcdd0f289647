// The shape of batched_product, y = op(a) op(b) for every task, where op transposes if requested.
#pragma once
#include <cstdint>

namespace imaml {

using std::int64_t;

// op(a) is [rows, terms], op(b) [terms, columns]; a and b are row-major. Tasks of a and b begin
// a_stride and b_stride elements apart; those of y follow each other.
struct ProductShape {
  int64_t tasks, rows, columns, terms, a_stride, b_stride;
  bool transpose_a, transpose_b;
};

}  // namespace imaml
