// matmul: result[.., m, n] = c[.., m, n] + sum_k a[.., m, k] b[.., k, n], c being optional.
//
// The tile of conv_tiles.h, up to kTileRows rows of two vectors of columns, needs b and the result
// contiguous along n. Preparation exchanges m and n where the result is contiguous along m; a b
// that is not contiguous along n is transposed into scratch, kTileLanes columns at a time. The
// elements of a are broadcast one by one, from any layout. Few rows or columns whose operands are
// contiguous along k are computed as dot products.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "cpu/conv_tiles.h"
#include "cpu/isa.h"
#include "cpu/program_call.h"

namespace imaml::cpu {
namespace {

enum Loop { kDepth, kColumns, kRows, kBatch };  // innermost first

template <typename T>
constexpr int64_t kVectorLanes = kTileLanes<T> / 2;

// One product. c may be null.
template <typename T>
struct Product {
  int64_t rows, columns, depth;
  T* result;
  int64_t result_row, result_column;
  const T* a;
  int64_t a_row, a_depth;
  const T* b;
  int64_t b_depth, b_column;
  const T* c;
  int64_t c_row, c_column;
};

template <typename T>
IMAML_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define IMAML_HAS_SHUFFLE 1
#endif
#endif

#if defined(IMAML_HAS_SHUFFLE)
// Transposes a square of one vector per row.
IMAML_INLINE void transpose(Vector<double> (&row)[4]) {
  Vector<double> pair[4];
  for (int i = 0; i < 4; i += 2) {
    pair[i] = __builtin_shufflevector(row[i], row[i + 1], 0, 4, 2, 6);
    pair[i + 1] = __builtin_shufflevector(row[i], row[i + 1], 1, 5, 3, 7);
  }
  for (int i = 0; i < 2; ++i) {
    row[i] = __builtin_shufflevector(pair[i], pair[i + 2], 0, 1, 4, 5);
    row[i + 2] = __builtin_shufflevector(pair[i], pair[i + 2], 2, 3, 6, 7);
  }
}

IMAML_INLINE void transpose(Vector<float> (&row)[8]) {
  Vector<float> pair[8], quad[8];
  for (int i = 0; i < 8; i += 2) {
    pair[i] = __builtin_shufflevector(row[i], row[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pair[i + 1] = __builtin_shufflevector(row[i], row[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      const Vector<float> first = pair[i + k], second = pair[i + k + 2];
      quad[i + 2 * k] = __builtin_shufflevector(first, second, 0, 1, 8, 9, 4, 5, 12, 13);
      quad[i + 2 * k + 1] = __builtin_shufflevector(first, second, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    row[i] = __builtin_shufflevector(quad[i], quad[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    row[i + 4] = __builtin_shufflevector(quad[i], quad[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#endif

// Transposes `width` columns of b into `panel`, in rows of kVectors vectors padded with zeros.
template <int64_t kVectors, typename T>
IMAML_INLINE void pack_columns(const Product<T>& p, int64_t column, int64_t width, T* panel) {
  constexpr int64_t lanes = kVectorLanes<T>, stride = kVectors * lanes;
  const T* b = p.b + column * p.b_column;
  for (int64_t first = 0; first < stride; first += lanes) {
    int64_t k = 0;
#if defined(IMAML_HAS_SHUFFLE)
    for (; p.b_depth == 1 && first + lanes <= width && k + lanes <= p.depth; k += lanes) {
      Vector<T> square[lanes];
      for (int64_t n = 0; n < lanes; ++n) square[n] = load(b + (first + n) * p.b_column + k);
      transpose(square);
      for (int64_t i = 0; i < lanes; ++i)
        *reinterpret_cast<Vector<T>*>(panel + (k + i) * stride + first) = square[i];
    }
#endif
    for (; k < p.depth; ++k)
      for (int64_t n = first; n < first + lanes; ++n)
        panel[k * stride + n] = n < width ? b[k * p.b_depth + n * p.b_column] : T(0);
  }
}

// Where a tile is stored. c may be null.
template <typename T>
struct Target {
  T* to;
  int64_t to_row;
  const T* c;
  int64_t c_row;
};

// kTile rows of kVectors vectors of columns. The panel holds row k of b at panel + k * stride.
template <int64_t kTile, int64_t kVectors, typename T>
IMAML_INLINE void product_tile(const T* a, int64_t a_row, int64_t a_depth, const T* panel,
                               int64_t stride, int64_t depth, Target<T> target) {
  constexpr int64_t lanes = kVectorLanes<T>;
  Vector<T> total[kTile][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_depth, panel += stride) {
    Vector<T> factor[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) factor[v] = load(panel + v * lanes);
#pragma GCC unroll 12
    for (int64_t r = 0; r < kTile; ++r) {
      const T scalar = a[r * a_row];
      for (int64_t v = 0; v < kVectors; ++v) total[r][v] += scalar * factor[v];
    }
  }
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t v = 0; v < kVectors; ++v) {
      if (target.c != nullptr) total[r][v] += load(target.c + r * target.c_row + v * lanes);
      *reinterpret_cast<Vector<T>*>(target.to + r * target.to_row + v * lanes) = total[r][v];
    }
}

// Calls body(std::integral_constant<int64_t, count>) for a count in [1, kMost].
template <int64_t kMost, typename Body>
IMAML_INLINE void with_constant(int64_t count, const Body& body) {
  if constexpr (kMost == 1) {
    body(std::integral_constant<int64_t, 1>{});
  } else {
    count == kMost ? body(std::integral_constant<int64_t, kMost>{})
                   : with_constant<kMost - 1>(count, body);
  }
}

// The first `width` columns of a tile whose result or c is not contiguous.
template <typename T>
IMAML_INLINE void store_columns(const Product<T>& p, int64_t row, int64_t rows, int64_t column,
                                int64_t width, const T* from, int64_t from_row) {
  for (int64_t r = row; r < row + rows; ++r, from += from_row)
    for (int64_t i = 0; i < width; ++i) {
      const int64_t n = column + i;
      p.result[r * p.result_row + n * p.result_column] =
          p.c == nullptr ? from[i] : from[i] + p.c[r * p.c_row + n * p.c_column];
    }
}

// `width` columns, at most kVectors vectors.
template <int64_t kVectors, typename T>
IMAML_INLINE void product_block(const Product<T>& p, int64_t column, int64_t width, T* scratch) {
  constexpr int64_t lanes = kVectors * kVectorLanes<T>;
  const bool direct = p.b_column == 1 && width == lanes;
  if (!direct) pack_columns<kVectors>(p, column, width, scratch);
  const T* panel = direct ? p.b + column : scratch;
  const int64_t stride = direct ? p.b_depth : lanes;
  const bool full = width == lanes && p.result_column == 1 && (p.c == nullptr || p.c_column == 1);
  // Twelve of AVX2's sixteen registers, in tiles of nearly equal height.
  constexpr int64_t most = 12 / kVectors;
  int64_t row = 0;
  for (int64_t tiles = (p.rows + most - 1) / most; tiles > 0; --tiles) {
    const int64_t rows = (p.rows - row + tiles - 1) / tiles;
    T buffer[most * lanes];
    const Target<T> target =
        full ? Target<T>{p.result + row * p.result_row + column, p.result_row,
                         p.c == nullptr ? nullptr : p.c + row * p.c_row + column, p.c_row}
             : Target<T>{buffer, lanes, nullptr, 0};
    with_constant<most>(rows, [&](auto tile) IMAML_INLINE_LAMBDA {
      product_tile<tile(), kVectors>(p.a + row * p.a_row, p.a_row, p.a_depth, panel, stride,
                                     p.depth, target);
    });
    if (!full) store_columns(p, row, rows, column, width, buffer, lanes);
    row += rows;
  }
}

template <typename T>
IMAML_INLINE void tiled_product(const Product<T>& p, T* scratch) {
  constexpr int64_t vector = kVectorLanes<T>;
  int64_t column = 0;
  for (; column + vector < p.columns; column += 2 * vector)
    product_block<2>(p, column, std::min(2 * vector, p.columns - column), scratch);
  if (column < p.columns) product_block<1>(p, column, p.columns - column, scratch);
}

template <typename T>
IMAML_INLINE T dot_product(const T* a, const T* b, int64_t n) {
  constexpr int64_t lanes = kVectorLanes<T>;
  Vector<T> total[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
    for (int64_t v = 0; v < 4; ++v) total[v] += load(a + i + v * lanes) * load(b + i + v * lanes);
  for (; i + lanes <= n; i += lanes) total[0] += load(a + i) * load(b + i);
  T rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  const Vector<T> all = (total[0] + total[1]) + (total[2] + total[3]);
  T lane[lanes];
  for (int64_t k = 0; k < lanes; ++k) lane[k] = all[k];
  for (int64_t width = lanes / 2; width > 0; width /= 2)
    for (int64_t k = 0; k < width; ++k) lane[k] += lane[k + width];
  return lane[0] + rest;
}

template <typename T>
IMAML_INLINE void product_of_dots(const Product<T>& p) {
  for (int64_t m = 0; m < p.rows; ++m)
    for (int64_t n = 0; n < p.columns; ++n) {
      const T c = p.c == nullptr ? T(0) : p.c[m * p.c_row + n * p.c_column];
      p.result[m * p.result_row + n * p.result_column] =
          c + dot_product(p.a + m * p.a_row, p.b + n * p.b_column, p.depth);
    }
}

// Fewer would not repay the transposition of b.
constexpr int64_t kLeastTiled = 3;

template <typename T>
IMAML_INLINE void product(const Call& call, Frame& frame) {
  const Place *r = &call.places[0], *a = &call.places[1], *b = &call.places[2],
              *c = &call.places[3];
  const bool has_c = call.integers[0] != 0;
  Product<T> p{.rows = call.size[kRows],
               .columns = call.size[kColumns],
               .depth = call.size[kDepth],
               .result = nullptr,
               .result_row = r->stride[kRows],
               .result_column = r->stride[kColumns],
               .a = nullptr,
               .a_row = a->stride[kRows],
               .a_depth = a->stride[kDepth],
               .b = nullptr,
               .b_depth = b->stride[kDepth],
               .b_column = b->stride[kColumns],
               .c = nullptr,
               .c_row = c->stride[kRows],
               .c_column = c->stride[kColumns]};
  const bool dots = call.integers[1] != 0;
  for_loops<4>(call, kBatch, call.loops, [&](const int64_t* at) IMAML_INLINE_LAMBDA {
    p.result = frame.at<T>(*r) + at[0];
    p.a = frame.at<const T>(*a) + at[1];
    p.b = frame.at<const T>(*b) + at[2];
    p.c = has_c ? frame.at<const T>(*c) + at[3] : nullptr;
    dots ? product_of_dots(p) : tiled_product(p, static_cast<T*>(frame.scratch));
  });
}

}  // namespace

namespace kernels {

#define IMAML_DEFINE(T) \
  IMAML_MULTIVERSION void matmul_##T(const Call& call, Frame& frame) { product<T>(call, frame); }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace kernels

namespace {

void exchange_rows_and_columns(Call& call) {
  std::swap(call.size[kRows], call.size[kColumns]);
  for (Place& place : call.places) std::swap(place.stride[kRows], place.stride[kColumns]);
  std::swap(call.places[1], call.places[2]);
}

// A result that is contiguous along n, or one row instead of one column.
bool exchange_helps(const Call& call) {
  const int64_t* result = call.places[0].stride;
  if (call.size[kRows] == 1) return false;
  if (call.size[kColumns] == 1) return true;
  return result[kColumns] != 1 && result[kRows] == 1;
}

// Each operand must be constant along the loop that it does not have.
void check_strides(Call& call) {
  const auto check = [&](std::size_t operand, Loop loop, const char* loop_name) {
    int64_t& stride = call.places[operand].stride[loop];
    if (call.size[loop] <= 1) stride = 0;
    if (stride != 0)
      throw std::invalid_argument("matmul: operand " + std::to_string(operand) +
                                  " must have stride 0 along " + loop_name + ", got " +
                                  std::to_string(stride));
  };
  check(0, kDepth, "k");
  check(1, kColumns, "n");
  check(2, kRows, "m");
  check(3, kDepth, "k");
}

void prepare_product(const std::string&, const Types& types, Call& call) {
  for (; call.loops < kBatch; ++call.loops) call.size[call.loops] = 1;
  const bool has_c = call.places.size() == 4;
  if (!has_c) call.places.push_back(call.places[0]);  // never read
  check_strides(call);
  for (int k = kColumns; k < call.loops; ++k)
    if (call.size[k] == 0) return;
  drop_unit_loops(call, kBatch);
  merge_loops(call, kRows);  // rows of one product where b is shared by the batch
  if (exchange_helps(call)) exchange_rows_and_columns(call);
  const int64_t *a = call.places[1].stride, *b = call.places[2].stride;
  const bool dots = a[kDepth] == 1 && b[kDepth] == 1 && call.size[kDepth] > 1 &&
                    std::min(call.size[kRows], call.size[kColumns]) < kLeastTiled;
  call.integers = {has_c, dots};
  call.scratch = dots ? 0 : call.size[kDepth] * kTileLanes<float>;
  call.kernel = KernelPair{kernels::matmul_float, kernels::matmul_double}.of(types.result);
}

}  // namespace

Prepare find_product(const std::string& name, Signature& signature) {
  if (name != "matmul") return nullptr;
  signature = {.operands = 3, .more_operands = 1};
  return prepare_product;
}

}  // namespace imaml::cpu
