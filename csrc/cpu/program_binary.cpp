// Elementwise functions of two or three arrays.
#include <algorithm>
#include <cmath>

#include "cpu/program_map.h"

namespace imaml::cpu {
namespace {

// Exponents of losses and their derivatives; with a constant exponent, the compiler moves the
// comparison out of the loop, which then vectorises.
template <typename T>
IMAML_INLINE T power(T x, T exponent) {
  return exponent == 2 ? x * x : exponent == 1 ? x : std::pow(x, exponent);
}

}  // namespace

// The scalar s is alpha in a + alpha b, or the threshold. Booleans are 0 and 1. maximum and minimum
// propagate NaN, and comparisons with NaN are false.
#define IMAML_FOR_BINARY(V)                       \
  V(add, 1, x + s * y)                            \
  V(sub, 1, x - s * y)                            \
  V(mul, 0, x* y)                                 \
  V(div, 0, x / y)                                \
  V(pow, 0, power(x, y))                          \
  V(maximum, 0, x >= y || x != x ? x : y)         \
  V(minimum, 0, x <= y || x != x ? x : y)         \
  V(eq, 0, T(x == y))                             \
  V(ne, 0, T(x != y))                             \
  V(lt, 0, T(x < y))                              \
  V(le, 0, T(x <= y))                             \
  V(gt, 0, T(x > y))                              \
  V(ge, 0, T(x >= y))                             \
  V(logical_and, 0, T(int(x != 0) & int(y != 0))) \
  V(logical_or, 0, T(int(x != 0) | int(y != 0)))  \
  V(threshold_backward, 1, y <= s ? T(0) : x)     \
  V(tanh_backward, 0, x*(T(1) - y * y))           \
  V(sigmoid_backward, 0, x* y*(T(1) - y))

namespace kernels {

#define IMAML_DEFINE(name, count, Type, value)                                            \
  IMAML_MULTIVERSION void name##_##Type(const Call& call, Frame& frame) {                 \
    using T = Type;                                                                       \
    const T s = count == 0 ? T(0) : static_cast<T>(call.scalars[0]);                      \
    (void)s;                                                                              \
    map_binary<T>(call, frame, [=](T x, T y) IMAML_INLINE_LAMBDA -> T { return value; }); \
  }
#define IMAML_DEFINE_PAIR(name, scalars, value) \
  IMAML_DEFINE(name, scalars, float, value)     \
  IMAML_DEFINE(name, scalars, double, value)
IMAML_FOR_BINARY(IMAML_DEFINE_PAIR)
#undef IMAML_DEFINE_PAIR
#undef IMAML_DEFINE

#define IMAML_DEFINE(T)                                                         \
  IMAML_MULTIVERSION void where_##T(const Call& call, Frame& frame) {           \
    map_ternary<T>(call, frame, [](T condition, T x, T y) IMAML_INLINE_LAMBDA { \
      return condition != 0 ? x : y;                                            \
    });                                                                         \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

}  // namespace kernels

namespace {

struct Named {
  const char* name;
  std::size_t operands, scalars;
  KernelPair kernels;
};

constexpr Named kNamed[] = {
#define IMAML_ROW(name, scalars, value) \
  {#name, 3, scalars, {kernels::name##_float, kernels::name##_double}},
    IMAML_FOR_BINARY(IMAML_ROW)
#undef IMAML_ROW
        {"where", 4, 0, {kernels::where_float, kernels::where_double}}};

const Named* lookup(const std::string& name) {
  const Named* found = std::find_if(std::begin(kNamed), std::end(kNamed),
                                    [&](const Named& one) { return one.name == name; });
  return found == std::end(kNamed) ? nullptr : found;
}

}  // namespace

Prepare find_binary(const std::string& name, Signature& signature) {
  const Named* found = lookup(name);
  if (found == nullptr) return nullptr;
  signature = {.operands = found->operands, .scalars = found->scalars};
  return [](const std::string& what, const Types& types, Call& call) {
    prepare_map(call, what.c_str(), lookup(what)->kernels.of(types.result));
  };
}

}  // namespace imaml::cpu
