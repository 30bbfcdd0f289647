// Elementwise functions of one array.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cpu/program_map.h"
#include "cpu/program_math.h"

namespace imaml::cpu {

// Booleans are 0 and 1. sign(NaN) is 0 and relu(NaN) is NaN, as in PyTorch.
#define IMAML_FOR_UNARY(V)           \
  V(neg, -x)                         \
  V(abs, std::abs(x))                \
  V(sign, T(x > 0) - T(x < 0))       \
  V(exp, branchless::exp(x))         \
  V(log, branchless::log(x))         \
  V(log1p, branchless::log1p(x))     \
  V(expm1, branchless::expm1(x))     \
  V(sqrt, std::sqrt(x))              \
  V(rsqrt, T(1) / std::sqrt(x))      \
  V(reciprocal, T(1) / x)            \
  V(sin, std::sin(x))                \
  V(cos, std::cos(x))                \
  V(tanh, branchless::tanh(x))       \
  V(sigmoid, branchless::sigmoid(x)) \
  V(erf, std::erf(x))                \
  V(relu, x <= 0 ? T(0) : x)         \
  V(floor, std::floor(x))            \
  V(ceil, std::ceil(x))              \
  V(logical_not, T(x == 0))          \
  V(isnan, T(x != x))

// target_clones applies to functions, not to templates: one plain function per element type.
namespace kernels {

using std::int32_t;
using std::uint8_t;

#define IMAML_DEFINE(name, Type, value)                                               \
  IMAML_MULTIVERSION void name##_##Type(const Call& call, Frame& frame) {             \
    using T = Type;                                                                   \
    map_unary<T, T>(call, frame, [](T x) IMAML_INLINE_LAMBDA -> T { return value; }); \
  }
#define IMAML_DEFINE_PAIR(name, value) \
  IMAML_DEFINE(name, float, value)     \
  IMAML_DEFINE(name, double, value)
IMAML_FOR_UNARY(IMAML_DEFINE_PAIR)
#undef IMAML_DEFINE_PAIR
#undef IMAML_DEFINE

// Copies from a float, double, int64, int32 or uint8.
#define IMAML_DEFINE(From, Type)                                                            \
  IMAML_MULTIVERSION void copy_##From##_##Type(const Call& call, Frame& frame) {            \
    map_unary<Type, From>(call, frame,                                                      \
                          [](From x) IMAML_INLINE_LAMBDA { return static_cast<Type>(x); }); \
  }
#define IMAML_DEFINE_PAIR(From) \
  IMAML_DEFINE(From, float)     \
  IMAML_DEFINE(From, double)
IMAML_DEFINE_PAIR(float)
IMAML_DEFINE_PAIR(double)
IMAML_DEFINE_PAIR(int64_t)
IMAML_DEFINE_PAIR(int32_t)
IMAML_DEFINE_PAIR(uint8_t)
#undef IMAML_DEFINE_PAIR
#undef IMAML_DEFINE

}  // namespace kernels

namespace {

struct Unary {
  const char* name;
  KernelPair kernels;
};

constexpr Unary kUnary[] = {
#define IMAML_ROW(name, value) {#name, {kernels::name##_float, kernels::name##_double}},
    IMAML_FOR_UNARY(IMAML_ROW)
#undef IMAML_ROW
};

KernelPair copy_from(DType type) {
  switch (type) {
    case DType::kFloat32:
      return {kernels::copy_float_float, kernels::copy_float_double};
    case DType::kFloat64:
      return {kernels::copy_double_float, kernels::copy_double_double};
    case DType::kInt64:
      return {kernels::copy_int64_t_float, kernels::copy_int64_t_double};
    case DType::kInt32:
      return {kernels::copy_int32_t_float, kernels::copy_int32_t_double};
    case DType::kUint8:
      return {kernels::copy_uint8_t_float, kernels::copy_uint8_t_double};
  }
  return {};
}

const Unary* lookup(const std::string& name) {
  const Unary* found = std::find_if(std::begin(kUnary), std::end(kUnary),
                                    [&](const Unary& one) { return one.name == name; });
  return found == std::end(kUnary) ? nullptr : found;
}

}  // namespace

void prepare_map(Call& call, const char* name, Kernel kernel) {
  const int64_t* size = call.size;
  if (std::find(size, size + call.loops, 0) != size + call.loops) return;
  drop_unit_loops(call);
  for (int k = 0; k < call.loops; ++k)
    if (call.places[0].stride[k] == 0)
      throw std::invalid_argument(std::string(name) +
                                  ": the result must not have a stride of 0 in a loop of size " +
                                  std::to_string(call.size[k]));
  reorder_loops(call, by_stride(call, 0));
  merge_loops(call);
  if (call.loops == 0) add_unit_loop(call);
  call.kernel = kernel;
}

Prepare find_unary(const std::string& name, Signature& signature) {
  if (name != "copy" && lookup(name) == nullptr) return nullptr;
  signature = {.operands = 2};
  return [](const std::string& what, const Types& types, Call& call) {
    const KernelPair pair = what == "copy" ? copy_from(types.source) : lookup(what)->kernels;
    prepare_map(call, what.c_str(), pair.of(types.result));
  };
}

}  // namespace imaml::cpu
