// exp, expm1, log, log1p, tanh and the logistic function for float and double, without branches or
// calls, so that loops over them vectorise. Their error is a few units in the last place over the
// whole range, subnormal numbers included. NaN, infinities and overflow are as in <cmath>.
//
// The polynomials are minimax approximations (Remez) of (expm1(r) - r) / r^2 on |r| <= ln(2) / 2
// and of (log((1 + s) / (1 - s)) - 2 s) / s^3, as a function of s^2, for (1 + s) / (1 - s) in
// [sqrt(1/2), sqrt(2)]. The evaluation of log follows FreeBSD's e_log.c.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "formulas.h"

namespace imaml::cpu::branchless {

template <typename T>
struct Format;

template <>
struct Format<float> {
  using Bits = std::uint32_t;
  static constexpr int mantissa = 23;
  static constexpr Bits bias = 127, sqrt_half = 0x3f3504f3;
  static constexpr float round = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.4286068203094172321e-6f;
  static constexpr float exp_least = -104, exp_most = 89, expm1_least = -30;
  static constexpr float exp[] = {0.50000000626462032787f, 0.16666542048397872045f,
                                  0.041666279080477990199f, 0.0083667106482103078113f,
                                  0.0013946670316156302051f};
  static constexpr float log[] = {0.666666665526043937f, 0.40000123091597845604f,
                                  0.2855069894100266356f, 0.23333418481975745931f};
};

template <>
struct Format<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa = 52;
  static constexpr Bits bias = 1023, sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double round = 0x1.8p52;
  static constexpr double ln2_high = 0.6931471805596629565116018,
                          ln2_low = 2.8235290563031577123e-13;
  static constexpr double exp_least = -746, exp_most = 710, expm1_least = -50;
  static constexpr double exp[] = {0.50000000000000056563,     0.16666666666666686365,
                                   0.041666666666572201232,    0.008333333333314305288,
                                   0.001388888893287703477,    0.00019841269903741515879,
                                   0.000024801503814190421488, 2.7557227250918549098e-6,
                                   2.762658922715591906e-7,    2.5114713955834228329e-8};
  static constexpr double log[] = {0.66666666666666697487, 0.39999999999897884519,
                                   0.28571428626652432531, 0.22222211031636000934,
                                   0.18182896213247168875, 0.15331497637997850219,
                                   0.14619098033209351151};
};

template <typename T>
IMAML_INLINE auto to_bits(T value) {
  return std::bit_cast<typename Format<T>::Bits>(value);
}
template <typename T>
IMAML_INLINE T from_bits(typename Format<T>::Bits bits) {
  return std::bit_cast<T>(bits);
}

template <typename T, std::size_t N>
IMAML_INLINE T polynomial(const T (&coefficients)[N], T x) {
  T total = coefficients[N - 1];
#pragma GCC unroll 16
  for (int k = static_cast<int>(N) - 2; k >= 0; --k) total = total * x + coefficients[k];
  return total;
}

// 2^n of the integer n that was rounded by adding Format::round.
template <typename T>
IMAML_INLINE T power_of_two(T rounded) {
  return from_bits<T>((to_bits(rounded) + Format<T>::bias) << Format<T>::mantissa);
}

// exp(x) = 2^n (1 + fraction), with |n ln(2) - x| <= ln(2) / 2.
template <typename T>
struct Exponential {
  T rounded, n, fraction;

  // NaN is not clamped.
  IMAML_INLINE Exponential(T x, T least) {
    using F = Format<T>;
    x = x < least ? least : x;
    x = x > F::exp_most ? F::exp_most : x;
    rounded = x * T(1.4426950408889634074) + F::round;
    n = rounded - F::round;
    const T r = (x - n * F::ln2_high) - n * F::ln2_low;
    fraction = r + r * r * polynomial(F::exp, r);
  }
};

// 2^n in two factors, neither of which overflows or is subnormal; only the last product rounds.
template <typename T>
IMAML_INLINE T exp(T x) {
  using F = Format<T>;
  const Exponential<T> e(x, F::exp_least);
  const T half = e.n * T(0.5) + F::round;
  const T rest = (e.n - (half - F::round)) + F::round;
  return (T(1) + e.fraction) * power_of_two(half) * power_of_two(rest);
}

template <typename T>
IMAML_INLINE T expm1(T x) {
  const Exponential<T> e(x, Format<T>::expm1_least);
  const T half = power_of_two(e.rounded - T(1));  // 2^n overflows where the result does not
  const T result = T(2) * (half * e.fraction + (half - T(0.5)));
  return x == 0 ? x : result;
}

template <typename T>
IMAML_INLINE T log(T x) {
  using F = Format<T>;
  using limits = std::numeric_limits<T>;
  constexpr auto one = F::bias << F::mantissa;
  constexpr auto mantissa_bits = (typename F::Bits(1) << F::mantissa) - 1;
  constexpr T scale = F::round / T(1.5);  // 2^mantissa
  const bool subnormal = x < limits::min();
  // x = 2^n (1 + f); the integer n becomes a T by way of the mantissa of scale + n.
  const auto bits = to_bits(subnormal ? x * scale : x) + (one - F::sqrt_half);
  const T n = from_bits<T>((bits >> F::mantissa) | to_bits(scale)) -
              (subnormal ? scale + T(F::bias) + T(F::mantissa) : scale + T(F::bias));
  const T f = from_bits<T>((bits & mantissa_bits) + F::sqrt_half) - T(1);
  const T s = f / (T(2) + f), z = s * s;
  const T half_square = T(0.5) * f * f;
  const T tail = s * (half_square + z * polynomial(F::log, z)) + n * F::ln2_low;
  const T result = n * F::ln2_high - ((half_square - tail) - f);
  const T special = x == 0 ? -limits::infinity() : limits::quiet_NaN();
  return x > 0 ? (x == limits::infinity() ? x : result) : special;
}

// log(u) + (1 + x - u) / u with u = 1 + x rounded.
template <typename T>
IMAML_INLINE T log1p(T x) {
  const T u = T(1) + x;
  const T lost = x < 1 ? x - (u - T(1)) : T(1) - (u - x);
  const T main = log(u);
  const bool regular = u > 0 && u < std::numeric_limits<T>::infinity();
  const T result = regular ? main + lost / u : main;
  return x == 0 ? x : result;
}

template <typename T>
IMAML_INLINE T tanh(T x) {
  const T t = expm1(T(-2) * std::abs(x));
  return std::copysign(t / (t + T(2)), x);  // t <= 0
}

template <typename T>
IMAML_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}

}  // namespace imaml::cpu::branchless
