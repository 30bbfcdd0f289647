// map: result[i] = f(a[i], ...) over the loops. The inner loop has a form that vectorises where the
// arrays are contiguous or constant along it.
//
// ivdep: the result is apart from the operands or the same array, so that no iteration depends on
// another.
#pragma once
#include "cpu/isa.h"
#include "cpu/program_call.h"

namespace imaml::cpu {

// With a constant stride the first loop vectorises.
template <typename T, typename Value>
IMAML_INLINE void store_row(T* to, int64_t stride, int64_t n, const Value& value) {
  if (stride == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) to[i] = value(i);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * stride] = value(i);
  }
}

template <typename T, typename A, typename F>
IMAML_INLINE void map_row(const F& f, int64_t n, T* to, int64_t to_stride, const A* a,
                          int64_t a_stride) {
  if (a_stride == 1)
    store_row(to, to_stride, n, [=](int64_t i) IMAML_INLINE_LAMBDA { return f(a[i]); });
  else if (a_stride == 0)
    store_row(to, to_stride, n, [value = f(a[0])](int64_t) IMAML_INLINE_LAMBDA { return value; });
  else
    store_row(to, to_stride, n, [=](int64_t i) IMAML_INLINE_LAMBDA { return f(a[i * a_stride]); });
}

template <typename T, typename F>
IMAML_INLINE void map_row(const F& f, int64_t n, T* to, int64_t to_stride, const T* a,
                          int64_t a_stride, const T* b, int64_t b_stride) {
  if (a_stride == 1 && b_stride == 1)
    store_row(to, to_stride, n, [=](int64_t i) IMAML_INLINE_LAMBDA { return f(a[i], b[i]); });
  else if (a_stride == 1 && b_stride == 0)
    store_row(to, to_stride, n,
              [=, value = b[0]](int64_t i) IMAML_INLINE_LAMBDA { return f(a[i], value); });
  else if (a_stride == 0 && b_stride == 1)
    store_row(to, to_stride, n,
              [=, value = a[0]](int64_t i) IMAML_INLINE_LAMBDA { return f(value, b[i]); });
  else
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = f(a[i * a_stride], b[i * b_stride]);
}

template <typename T, typename F>
IMAML_INLINE void map_row(const F& f, int64_t n, T* to, int64_t to_stride, const T* a,
                          int64_t a_stride, const T* b, int64_t b_stride, const T* c,
                          int64_t c_stride) {
  if (a_stride == 1 && b_stride == 1 && c_stride == 1)
    store_row(to, to_stride, n, [=](int64_t i) IMAML_INLINE_LAMBDA { return f(a[i], b[i], c[i]); });
  else if (a_stride == 1 && b_stride == 1 && c_stride == 0)
    store_row(to, to_stride, n,
              [=, value = c[0]](int64_t i) IMAML_INLINE_LAMBDA { return f(a[i], b[i], value); });
  else if (a_stride == 1 && b_stride == 0 && c_stride == 1)
    store_row(to, to_stride, n,
              [=, value = b[0]](int64_t i) IMAML_INLINE_LAMBDA { return f(a[i], value, c[i]); });
  else
    for (int64_t i = 0; i < n; ++i)
      to[i * to_stride] = f(a[i * a_stride], b[i * b_stride], c[i * c_stride]);
}

template <typename T, typename A, typename F>
IMAML_INLINE void map_unary(const Call& call, Frame& frame, const F& f) {
  const Place *r = &call.places[0], *a = &call.places[1];
  T* result = frame.at<T>(*r);
  const A* x = frame.at<const A>(*a);
  for_loops<2>(call, 1, call.loops, [&](const int64_t* at) IMAML_INLINE_LAMBDA {
    map_row(f, call.size[0], result + at[0], r->stride[0], x + at[1], a->stride[0]);
  });
}

template <typename T, typename F>
IMAML_INLINE void map_binary(const Call& call, Frame& frame, const F& f) {
  const Place *r = &call.places[0], *a = &call.places[1], *b = &call.places[2];
  T* result = frame.at<T>(*r);
  const T *x = frame.at<const T>(*a), *y = frame.at<const T>(*b);
  for_loops<3>(call, 1, call.loops, [&](const int64_t* at) IMAML_INLINE_LAMBDA {
    map_row(f, call.size[0], result + at[0], r->stride[0], x + at[1], a->stride[0], y + at[2],
            b->stride[0]);
  });
}

template <typename T, typename F>
IMAML_INLINE void map_ternary(const Call& call, Frame& frame, const F& f) {
  const Place *r = &call.places[0], *a = &call.places[1], *b = &call.places[2],
              *c = &call.places[3];
  T* result = frame.at<T>(*r);
  const T *x = frame.at<const T>(*a), *y = frame.at<const T>(*b), *z = frame.at<const T>(*c);
  for_loops<4>(call, 1, call.loops, [&](const int64_t* at) IMAML_INLINE_LAMBDA {
    map_row(f, call.size[0], result + at[0], r->stride[0], x + at[1], a->stride[0], y + at[2],
            b->stride[0], z + at[3], c->stride[0]);
  });
}

// Reorders and merges the loops so that the inner one is long and contiguous, and sets the kernel.
void prepare_map(Call& call, const char* name, Kernel kernel);

}  // namespace imaml::cpu
