// gather:       result[i] = source[i, with index[i] in the indexed dimension]
// scatter_set:  result[i, with index[i] in the indexed dimension] = value[i], one after the other
// scatter_add:  the same with +=
//
// integers: the stride and the size of the indexed dimension of the source or result, whose stride
// in the loop is 0. An element whose index is out of range is read as 0, or not written.
#include <algorithm>

#include "cpu/isa.h"
#include "cpu/program_call.h"

namespace imaml::cpu {
namespace {

// The offset of an index, or -1 if it is out of range. An index is an exact integer.
template <typename T>
IMAML_INLINE int64_t offset_of(T index, int64_t stride, int64_t size) {
  return index >= 0 && index < static_cast<T>(size) ? static_cast<int64_t>(index) * stride : -1;
}

template <typename T>
IMAML_INLINE void gather(const Call& call, Frame& frame) {
  const Place *r = &call.places[0], *s = &call.places[1], *x = &call.places[2];
  T* result = frame.at<T>(*r);
  const T *source = frame.at<const T>(*s), *index = frame.at<const T>(*x);
  const int64_t stride = call.integers[0], size = call.integers[1];
  bool in_range = true;
  for_loops<3>(call, 1, call.loops, [&](const int64_t* at) IMAML_INLINE_LAMBDA {
    for (int64_t i = 0; i < call.size[0]; ++i) {
      const int64_t offset = offset_of(index[at[2] + i * x->stride[0]], stride, size);
      in_range = in_range && offset >= 0;
      result[at[0] + i * r->stride[0]] =
          offset < 0 ? T(0) : source[at[1] + i * s->stride[0] + offset];
    }
  });
  frame.in_range = frame.in_range && in_range;
}

template <bool kAdd, typename T>
IMAML_INLINE void scatter(const Call& call, Frame& frame) {
  const Place *r = &call.places[0], *x = &call.places[1], *v = &call.places[2];
  T* result = frame.at<T>(*r);
  const T *index = frame.at<const T>(*x), *value = frame.at<const T>(*v);
  const int64_t stride = call.integers[0], size = call.integers[1];
  for_loops<3>(call, 1, call.loops, [&](const int64_t* at) IMAML_INLINE_LAMBDA {
    for (int64_t i = 0; i < call.size[0]; ++i) {
      const int64_t offset = offset_of(index[at[1] + i * x->stride[0]], stride, size);
      if (offset < 0) {
        frame.in_range = false;
        continue;
      }
      T& to = result[at[0] + i * r->stride[0] + offset];
      const T from = value[at[2] + i * v->stride[0]];
      to = kAdd ? to + from : from;
    }
  });
}

}  // namespace

namespace kernels {

#define IMAML_DEFINE(T)                                                                          \
  IMAML_MULTIVERSION void gather_##T(const Call& call, Frame& frame) { gather<T>(call, frame); } \
  IMAML_MULTIVERSION void scatter_set_##T(const Call& call, Frame& frame) {                      \
    scatter<false, T>(call, frame);                                                              \
  }                                                                                              \
  IMAML_MULTIVERSION void scatter_add_##T(const Call& call, Frame& frame) {                      \
    scatter<true, T>(call, frame);                                                               \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace kernels

Prepare find_indexing(const std::string& name, Signature& signature) {
  if (name != "gather" && name != "scatter_set" && name != "scatter_add") return nullptr;
  signature = {.operands = 3, .integers = 2};
  return [](const std::string& what, const Types& types, Call& call) {
    const int64_t* size = call.size;
    if (std::find(size, size + call.loops, 0) != size + call.loops) return;
    drop_unit_loops(call);
    merge_loops(call);
    if (call.loops == 0) add_unit_loop(call);
    const KernelPair pair =
        what == "gather" ? KernelPair{kernels::gather_float, kernels::gather_double}
        : what == "scatter_set"
            ? KernelPair{kernels::scatter_set_float, kernels::scatter_set_double}
            : KernelPair{kernels::scatter_add_float, kernels::scatter_add_double};
    call.kernel = pair.of(types.result);
  };
}

}  // namespace imaml::cpu
