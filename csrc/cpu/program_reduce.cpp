// sum, amax, amin over the loops in which the result's stride is 0. amax and amin propagate NaN.
//
// Sums of floats are accumulated in double, in an order that depends only on the sizes and strides.
// Where the loop in which the operand is contiguous is reduced, 16 partial sums run along it; where
// it is kept, up to 16 of its results are summed at the same time.
#include <algorithm>
#include <limits>

#include "cpu/isa.h"
#include "cpu/program_call.h"

namespace imaml::cpu {
namespace {

template <typename T>
struct FourOf;
template <>
struct FourOf<float> {
  using type = float __attribute__((vector_size(16), aligned(4)));
};
template <>
struct FourOf<double> {
  using type = double __attribute__((vector_size(32), aligned(8)));
};
template <typename T>
using Four = typename FourOf<T>::type;

// A reduction of Total's; `add` takes scalars and vectors.
template <typename T>
struct Sum {
  using Total = double;
  static constexpr Total initial = 0;
  template <typename V>
  IMAML_INLINE static V add(V total, V value) {
    return total + value;
  }
};

template <typename T>
struct Max {
  using Total = T;
  static constexpr Total initial = -std::numeric_limits<T>::infinity();
  template <typename V>
  IMAML_INLINE static V add(V total, V value) {
    return (value > total) | (value != value) ? value : total;
  }
};

template <typename T>
struct Min {
  using Total = T;
  static constexpr Total initial = std::numeric_limits<T>::infinity();
  template <typename V>
  IMAML_INLINE static V add(V total, V value) {
    return (value < total) | (value != value) ? value : total;
  }
};

template <typename Op, typename T>
IMAML_INLINE Four<typename Op::Total> load(const T* from) {
  return __builtin_convertvector(*reinterpret_cast<const Four<T>*>(from), Four<typename Op::Total>);
}

// A reduction in 16 lanes, for long rows, and in 4 and 1 for the rest of a row.
template <typename Op, typename T>
struct Lanes {
  using Total = typename Op::Total;
  using Totals = Four<Total>;
  Totals many[4];
  Total one = Op::initial;

  IMAML_INLINE Lanes() {
    for (Totals& four : many) four = Totals{} + Op::initial;
  }
  IMAML_INLINE void add(const T* from, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
      for (int k = 0; k < 4; ++k) many[k] = Op::add(many[k], load<Op>(from + i + 4 * k));
    for (; i + 4 <= n; i += 4) many[0] = Op::add(many[0], load<Op>(from + i));
    for (; i < n; ++i) add(from[i]);
  }
  IMAML_INLINE void add(T value) { one = Op::add(one, static_cast<Total>(value)); }
  IMAML_INLINE T total() const {
    const Totals all = Op::add(Op::add(many[0], many[1]), Op::add(many[2], many[3]));
    const Total four = Op::add(Op::add(all[0], all[1]), Op::add(all[2], all[3]));
    return static_cast<T>(Op::add(four, one));
  }
};

// Loops: the reduced ones, of which the innermost is contiguous, then the kept ones.
template <typename Op, typename T>
IMAML_INLINE void reduce_inner(const Call& call, Frame& frame, int reduced) {
  T* result = frame.at<T>(call.places[0]);
  const T* from = frame.at<const T>(call.places[1]);
  const int64_t n = call.size[0], stride = call.places[1].stride[0];
  for_loops<2>(call, reduced, call.loops, [&](const int64_t* kept) IMAML_INLINE_LAMBDA {
    Lanes<Op, T> lanes;
    const T* first = from + kept[1];
    for_loops<2>(call, 1, reduced, [&](const int64_t* at) IMAML_INLINE_LAMBDA {
      if (stride == 1)
        lanes.add(first + at[1], n);
      else
        for (int64_t i = 0; i < n; ++i) lanes.add(first[at[1] + i * stride]);
    });
    result[kept[0]] = lanes.total();
  });
}

// Reduces 4 kFours neighbours over the loops [1, reduced].
template <typename Op, int kFours, typename T>
IMAML_INLINE void reduce_columns(const Call& call, int reduced, const T* from, T* to) {
  Four<typename Op::Total> total[kFours];
  for (auto& four : total) four = Four<typename Op::Total>{} + Op::initial;
  for_loops<2>(call, 2, reduced + 1, [&](const int64_t* at) IMAML_INLINE_LAMBDA {
    const T* row = from + at[1];
    for (int64_t i = 0; i < call.size[1]; ++i, row += call.places[1].stride[1])
      for (int k = 0; k < kFours; ++k) total[k] = Op::add(total[k], load<Op>(row + 4 * k));
  });
  const int64_t stride = call.places[0].stride[0];
  for (int k = 0; k < 4 * kFours; ++k) to[k * stride] = static_cast<T>(total[k / 4][k % 4]);
}

template <typename Op, typename T>
IMAML_INLINE void reduce_column(const Call& call, int reduced, const T* from, T* to) {
  typename Op::Total total = Op::initial;
  for_loops<2>(call, 2, reduced + 1, [&](const int64_t* at) IMAML_INLINE_LAMBDA {
    const T* row = from + at[1];
    for (int64_t i = 0; i < call.size[1]; ++i, row += call.places[1].stride[1])
      total = Op::add(total, static_cast<typename Op::Total>(*row));
  });
  *to = static_cast<T>(total);
}

// Loops: a kept one, which is contiguous, then the reduced ones, then the other kept ones.
template <typename Op, typename T>
IMAML_INLINE void reduce_outer(const Call& call, Frame& frame, int reduced) {
  T* result = frame.at<T>(call.places[0]);
  const T* from = frame.at<const T>(call.places[1]);
  const int64_t n = call.size[0], stride = call.places[0].stride[0];
  for_loops<2>(call, reduced + 1, call.loops, [&](const int64_t* kept) IMAML_INLINE_LAMBDA {
    T* to = result + kept[0];
    const T* row = from + kept[1];
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) reduce_columns<Op, 4>(call, reduced, row + i, to + i * stride);
    for (; i + 4 <= n; i += 4) reduce_columns<Op, 1>(call, reduced, row + i, to + i * stride);
    for (; i < n; ++i) reduce_column<Op>(call, reduced, row + i, to + i * stride);
  });
}

// integers: the number of reduced loops, and whether the innermost loop is one of them.
template <typename Op, typename T>
IMAML_INLINE void reduce(const Call& call, Frame& frame) {
  const int reduced = static_cast<int>(call.integers[0]);
  call.integers[1] ? reduce_inner<Op, T>(call, frame, reduced)
                   : reduce_outer<Op, T>(call, frame, reduced);
}

template <typename T>
IMAML_INLINE void fill(const Call& call, Frame& frame) {
  T* result = frame.at<T>(call.places[0]);
  const T value = static_cast<T>(call.scalars[0]);
  for_loops<1>(call, 0, call.loops, [&](const int64_t* at) { result[at[0]] = value; });
}

}  // namespace

namespace kernels {

#define IMAML_DEFINE(T)                                              \
  IMAML_MULTIVERSION void sum_##T(const Call& call, Frame& frame) {  \
    reduce<Sum<T>, T>(call, frame);                                  \
  }                                                                  \
  IMAML_MULTIVERSION void amax_##T(const Call& call, Frame& frame) { \
    reduce<Max<T>, T>(call, frame);                                  \
  }                                                                  \
  IMAML_MULTIVERSION void amin_##T(const Call& call, Frame& frame) { \
    reduce<Min<T>, T>(call, frame);                                  \
  }                                                                  \
  void fill_##T(const Call& call, Frame& frame) { fill<T>(call, frame); }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace kernels

namespace {

// A sum of no elements is 0.
void prepare_empty(Call& call, double value, const Types& types) {
  for (int k = call.loops - 1; k >= 0; --k)
    if (call.places[0].stride[k] == 0) call.size[k] = 1;
  const int64_t* size = call.size;
  if (std::find(size, size + call.loops, 0) != size + call.loops) return;
  call.scalars = {value};
  call.kernel = KernelPair{kernels::fill_float, kernels::fill_double}.of(types.result);
}

void prepare_reduction(const std::string& name, const Types& types, Call& call) {
  const int64_t* size = call.size;
  const double infinity = std::numeric_limits<double>::infinity();
  if (std::find(size, size + call.loops, 0) != size + call.loops)
    return prepare_empty(call, name == "sum" ? 0 : name == "amax" ? -infinity : infinity, types);
  drop_unit_loops(call);
  const int64_t *kept = call.places[0].stride, *from = call.places[1].stride;
  std::vector<int> order = by_stride(call, 1);
  const bool outer = !order.empty() && kept[order[0]] != 0 && from[order[0]] == 1;
  const auto reduced = std::stable_partition(order.begin() + outer, order.end(),
                                             [&](int loop) { return kept[loop] == 0; }) -
                       (order.begin() + outer);
  if (reduced == 0) {
    Signature signature;
    return find_unary("copy", signature)("copy", {types.result, types.result}, call);
  }
  reorder_loops(call, order);
  merge_loops(call);  // never a reduced loop with a kept one
  const auto is_reduced = [](int64_t stride) { return stride == 0; };
  call.integers = {std::count_if(kept, kept + call.loops, is_reduced), !outer};
  call.kernel = (name == "sum"    ? KernelPair{kernels::sum_float, kernels::sum_double}
                 : name == "amax" ? KernelPair{kernels::amax_float, kernels::amax_double}
                                  : KernelPair{kernels::amin_float, kernels::amin_double})
                    .of(types.result);
}

}  // namespace

Prepare find_reduction(const std::string& name, Signature& signature) {
  if (name != "sum" && name != "amax" && name != "amin") return nullptr;
  signature = {.operands = 2};
  return prepare_reduction;
}

}  // namespace imaml::cpu
